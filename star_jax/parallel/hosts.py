"""Which processes train together, and how do they find each other?

Every machine runs the same command, one process each, in one of three ways:

    addresses   STAR_JAX_COORDINATOR=10.0.0.1:8476   host and a free port of process 0
                STAR_JAX_PROCESSES=4                 number of processes
                STAR_JAX_PROCESS=0                   number of this process, from 0
    SLURM       srun star-jax train ...              one task per node, or one per GPU
    TPU pods    the command on all workers           one slice, or several

The first is tried first; without any of them a process is alone. `JAX_COORDINATOR_PORT` changes the
port that JAX chooses on SLURM and TPUs.
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
VARIABLES = (COORDINATOR, PROCESSES, PROCESS)
START_TIMEOUT = 300  # seconds within which all processes must have started
MAX_PORT = 65535


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessAddress:
    """One process among several, as set in its environment.

    Attributes:
        host: name or address of the machine of process 0.
        port: TCP port on which process 0 listens.
        processes: number of processes of the run.
        process: number of this process, from 0.
    """

    host: str
    port: int
    processes: int
    process: int

    @property
    def coordinator(self) -> str:
        """host:port of process 0; an IPv6 host in brackets."""
        return f'[{self.host}]:{self.port}' if ':' in self.host else f'{self.host}:{self.port}'


def connect() -> None:
    """Connects this process to the others that its environment names; without them does nothing.

    Call it before JAX uses a device. Raises UserError if the environment is invalid, or if not all
    processes start.
    """
    if jax.distributed.is_initialized():
        return
    if address := read_address(os.environ):
        rendezvous.meet(
            host=address.host,
            port=address.port,
            processes=address.processes,
            process=address.process,
            timeout=START_TIMEOUT,
        )
        _initialize(
            coordinator_address=address.coordinator,
            num_processes=address.processes,
            process_id=address.process,
            cluster_detection_method='deactivate',
        )
    elif int(os.environ.get('SLURM_NTASKS', 1)) > 1 and 'SLURM_STEP_NODELIST' in os.environ:
        devices = slurm_devices(os.environ)
        _initialize(cluster_detection_method='slurm', local_device_ids=devices)
    elif 'tpu' in (jax.config.jax_platforms or ''):  # JAX sets it on the machines of a TPU
        _initialize()
    if jax.distributed.is_initialized() and jax.default_backend() == 'cpu':
        _connect_cpus()


def read_address(environment: Mapping[str, str]) -> ProcessAddress | None:
    """Parses the variables above; None for a process alone. Raises UserError if one is invalid."""
    values = {name: environment[name] for name in VARIABLES if environment.get(name)}
    if not values:
        return None
    if missing := [name for name in VARIABLES if name not in values]:
        raise UserError(
            f'{" and ".join(values)} is set, but {" and ".join(missing)} is not: several processes '
            f'need {", ".join(VARIABLES)}, and one alone needs none of them'
        )
    match = re.fullmatch(r'(\[[^\]]+\]|[^:\s]+):(\d+)', values[COORDINATOR])
    if match is None or not 0 < int(match[2]) <= MAX_PORT:
        raise UserError(
            f'{COORDINATOR} is {values[COORDINATOR]!r}, expected host:port of process 0, such as '
            '10.0.0.1:8476'
        )
    processes, process = (_whole_number(name, values[name]) for name in (PROCESSES, PROCESS))
    if processes < 1 or not 0 <= process < processes:
        raise UserError(
            f'{PROCESS}={process} of {PROCESSES}={processes}: expected one or more processes, '
            'numbered from 0'
        )
    if processes == 1:
        return None
    host = match[1].strip('[]')
    return ProcessAddress(host=host, port=int(match[2]), processes=processes, process=process)


def slurm_devices(environment: Mapping[str, str]) -> list[int] | None:
    """Indices of the GPUs of this task: all GPUs of the node if it is the only task there.

    None leaves the choice to JAX, which gives every task the GPU of its number on the node.
    """
    tasks = re.fullmatch(r'1(\(x\d+\))?', environment.get('SLURM_STEP_TASKS_PER_NODE', ''))
    gpus = environment.get('SLURM_GPUS_ON_NODE', '')
    return list(range(int(gpus))) if tasks and gpus.isdecimal() else None


def _connect_cpus() -> None:
    """Connects CPUs before anything large is compiled: they wait only 30 seconds for each other.

    Therefore all processes must compile equally long, and the compilation cache is disabled: on
    CPUs only process 0 would read what it wrote.
    """
    jax.config.update('jax_enable_compilation_cache', False)
    multihost_utils.sync_global_devices('connected')


def _initialize(**settings: object) -> None:
    """Initializes `jax.distributed`; a TPU of one machine may have no other process."""
    # The service would take SIGTERM from `training.stop_signals`, and lose a signal before the
    # first step.
    jax.config.update('jax_enable_preemption_service', False)
    try:
        jax.distributed.initialize(
            initialization_timeout=START_TIMEOUT,
            heartbeat_timeout_seconds=peer_watchdog.JAX_TIMEOUT,
            shutdown_timeout_seconds=peer_watchdog.JAX_TIMEOUT,
            **settings,
        )
    except (ValueError, OSError) as error:
        if settings:
            raise UserError(f'the processes of this run cannot connect ({error})') from error
    except RuntimeError as error:
        if 'must be called before' in str(error):
            raise UserError(
                'this command has used a device before it could connect to others, so it runs in '
                f'one process only: start it without {", ".join(VARIABLES)} and outside of srun'
            ) from error
        raise UserError(f'the processes of this run cannot connect ({error})') from error


def _whole_number(name: str, text: str) -> int:
    if not text.isdecimal():
        raise UserError(f'{name} is {text!r}, expected a whole number')
    return int(text)
