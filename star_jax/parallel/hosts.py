"""Which processes train together, and how do they find each other?

Every machine starts the same command, one process each, in one of three ways:

    plain addresses   STAR_JAX_COORDINATOR=10.0.0.1:8476   host and a free port of process 0
                      STAR_JAX_PROCESSES=4                 how many there are
                      STAR_JAX_PROCESS=0                   which this one is, from 0
    SLURM             srun star-jax train ...              one task per node, or one per GPU
    TPU pods          the command on all workers           a slice, or several

The first is looked for first; without any of them a process is alone. `JAX_COORDINATOR_PORT`
changes the port that JAX chooses on SLURM and TPUs.
"""

import dataclasses
import os
import re
from collections.abc import Mapping

import jax
from jax.experimental import multihost_utils

from star_jax.errors import UserError
from star_jax.parallel import peer_watchdog, rendezvous

COORDINATOR = 'STAR_JAX_COORDINATOR'
PROCESSES = 'STAR_JAX_PROCESSES'
PROCESS = 'STAR_JAX_PROCESS'
PLAIN = (COORDINATOR, PROCESSES, PROCESS)
MEETING = 300  # seconds within which all processes must have started
MOST_PORT = 65535


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """The place of one process among several, as its environment says."""

    host: str
    port: int
    processes: int
    process: int

    @property
    def coordinator(self) -> str:
        return f'[{self.host}]:{self.port}' if ':' in self.host else f'{self.host}:{self.port}'


def join() -> None:
    """Makes this process one of several where the environment says so; else it stays alone.

    To be called before JAX touches a device. Raises UserError where what the environment says is
    wrong, or the others do not come.
    """
    if jax.distributed.is_initialized():
        return
    if place := read_place(os.environ):
        rendezvous.hold(place.host, place.port, place.processes, place.process, MEETING)
        _initialize(
            coordinator_address=place.coordinator,
            num_processes=place.processes,
            process_id=place.process,
            cluster_detection_method='deactivate',
        )
    elif int(os.environ.get('SLURM_NTASKS', 1)) > 1 and 'SLURM_STEP_NODELIST' in os.environ:
        devices = slurm_devices(os.environ)
        _initialize(cluster_detection_method='slurm', local_device_ids=devices)
    elif 'tpu' in (jax.config.jax_platforms or ''):  # JAX sets it on the machines of a TPU
        _initialize()
    if jax.distributed.is_initialized() and jax.default_backend() == 'cpu':
        _connect()


def read_place(environment: Mapping[str, str]) -> Place | None:
    """What the variables above say, None for a process alone; a UserError for nonsense."""
    given = {name: environment[name] for name in PLAIN if environment.get(name)}
    if not given:
        return None
    if missing := [name for name in PLAIN if name not in given]:
        raise UserError(
            f'{" and ".join(given)} is set, but {" and ".join(missing)} is not: several processes '
            f'need {", ".join(PLAIN)}, and one alone needs none of them'
        )
    address = re.fullmatch(r'(\[[^\]]+\]|[^:\s]+):(\d+)', given[COORDINATOR])
    if address is None or not 0 < int(address[2]) <= MOST_PORT:
        raise UserError(
            f'{COORDINATOR} is {given[COORDINATOR]!r}, expected host:port of process 0, such as '
            '10.0.0.1:8476'
        )
    processes, process = (_whole_number(name, given[name]) for name in (PROCESSES, PROCESS))
    if processes < 1 or not 0 <= process < processes:
        raise UserError(
            f'{PROCESS}={process} of {PROCESSES}={processes}: expected one or more processes, '
            'numbered from 0'
        )
    host = address[1].strip('[]')
    place = Place(host=host, port=int(address[2]), processes=processes, process=process)
    return place if processes > 1 else None


def slurm_devices(environment: Mapping[str, str]) -> list[int] | None:
    """The GPUs of this task: all of its node where it is the only one there.

    None leaves the choice to JAX, which gives every task the one of its number.
    """
    tasks = re.fullmatch(r'1(\(x\d+\))?', environment.get('SLURM_STEP_TASKS_PER_NODE', ''))
    gpus = environment.get('SLURM_GPUS_ON_NODE', '')
    return list(range(int(gpus))) if tasks and gpus.isdecimal() else None


def _connect() -> None:
    """Lets CPUs connect before anything large is compiled: they wait 30 seconds for each other.

    So none may find compiled what others compile, and on CPUs only process 0 finds what it wrote.
    """
    jax.config.update('jax_enable_compilation_cache', False)
    multihost_utils.sync_global_devices('met')


def _initialize(**settings: object) -> None:
    """Joins the others; on a TPU of one machine there may be nobody to join."""
    jax.config.update('jax_enable_preemption_service', False)  # it would take SIGTERM from the run
    try:
        jax.distributed.initialize(
            initialization_timeout=MEETING,
            heartbeat_timeout_seconds=peer_watchdog.DEAD,
            shutdown_timeout_seconds=peer_watchdog.DEAD,
            **settings,
        )
    except (ValueError, OSError) as error:
        if settings:
            raise UserError(f'the processes of this run cannot meet ({error})') from error
    except RuntimeError as error:
        if 'must be called before' in str(error):
            raise UserError(
                'this command has used a device before it could join other processes: it runs in '
                f'one process only, so start it without {", ".join(PLAIN)} and outside of srun'
            ) from error
        raise UserError(f'the processes of this run cannot meet ({error})') from error


def _whole_number(name: str, text: str) -> int:
    if not text.isdecimal():
        raise UserError(f'{name} is {text!r}, expected a whole number')
    return int(text)
