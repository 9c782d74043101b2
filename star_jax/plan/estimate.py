"""What memory, traffic and communication does one device need for a batch?

For TPUs the run's own programs are compiled ahead of time; for GPUs, or where that takes too long,
`analytic` counts their arrays.
"""

import dataclasses
import functools
import re
import time
from collections.abc import Callable, Sequence

import jax

from star_jax.errors import UserError
from star_jax.parallel.collectives import Collective
from star_jax.parallel.links import Fabric
from star_jax.parallel.mesh import MeshShape, batch_shards
from star_jax.parallel.rules import device_bytes
from star_jax.plan import analytic
from star_jax.plan.hlo import HloText
from star_jax.plan.topologies import Pod
from star_jax.plan.workload import (
    MakeWorkload,
    Program,
    Workload,
    sampling,
    training,
)
from star_jax.training.run import Run

UNITS = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}
OUT_OF_MEMORY = re.compile(
    r'HLO temporaries \(([\d.]+)([KMGT]?)\)|Used ([\d.]+)([KMGT]?) of',
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """The needs of one device for a batch.

    Attributes:
        images: images of the batch that one device holds.
        workload: the programs and the resident arrays.
        temporaries: bytes beside the resident arrays, by program.
        traffic: bytes read from and written to main memory per step, by program.
        collectives: the collectives of each program per step.
        grid: bytes beside the resident arrays while a sample grid is made: counted, not compiled.
        complete: whether all programs compiled; otherwise traffic and collectives are missing.
        compile_seconds: seconds that compilation took.
    """

    images: int
    workload: Workload
    temporaries: dict[str, int]
    traffic: dict[str, int]
    collectives: dict[str, list[Collective]]
    grid: int
    complete: bool
    compile_seconds: float

    @property
    def main(self) -> str:
        """The name of the main program."""
        return next(iter(self.temporaries))

    @property
    def peak_temporaries(self) -> int:
        """Bytes of the program of a step that needs most."""
        return max(self.temporaries.values())

    @property
    def total(self) -> int:
        """Bytes of a device in all."""
        resident = sum(map(device_bytes, self.workload.resident.values()))
        return resident + max(self.peak_temporaries, self.grid)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimator:
    """Estimates batches of a run on a pod.

    Attributes:
        run: the settings.
        pod: the machines.
        make_workload: `workload.training` or `workload.sampling`.
        shape: the axes of the mesh.
        devices: TPUs of the pod, from `pod.devices()`; none for GPUs.
        compiles: compile the programs for these devices.
        on_progress: receives a line of text before each slow step.
    """

    run: Run
    pod: Pod
    make_workload: MakeWorkload
    shape: MeshShape
    devices: Sequence[jax.Device]
    compiles: bool
    on_progress: Callable[[str], None]

    def estimate(self, batch: int, main_only: bool = False) -> Estimate:
        """The needs of a batch; `main_only` leaves out every program but the first."""
        run, pod = dataclasses.replace(self.run, batch=batch), self.pod
        if not self.compiles:
            return self.count(batch)
        mesh = self.shape.build(self.devices)
        workload = self.make_workload(run, mesh, pod.platform)
        compiled = {}
        for name, program in list(workload.programs.items())[: 1 if main_only else None]:
            self.on_progress(f'compiling the {name} for a batch of {batch}')
            resident = device_bytes(program.args)
            compiled[name] = compile_for(program, resident, pod.chips, pod.slices)
        texts = {name: item.text for name, item in compiled.items()}
        runs = {name: workload.programs[name].runs for name in compiled}
        return Estimate(
            images=batch // batch_shards(mesh),
            workload=workload,
            temporaries={name: item.temporaries for name, item in compiled.items()},
            traffic={
                name: runs[name] * text.traffic() if text else 0 for name, text in texts.items()
            },
            collectives={
                name: [item.times(runs[name]) for item in text.collectives()] if text else []
                for name, text in texts.items()
            },
            grid=self._grid(),
            complete=all(texts.values()),
            compile_seconds=sum(item.seconds for item in compiled.values()),
        )

    @property
    def sizes(self) -> tuple[int, ...]:
        """The lengths of the mesh axes."""
        return self.shape.sizes(self.pod.chips)

    def fits(self, estimate: Estimate) -> bool:
        """Whether the memory of a device suffices."""
        return estimate.total <= self.pod.chip.memory

    @functools.cached_property
    def fabric(self) -> Fabric:
        """The links of the pod, for devices in the order of the mesh."""
        if not len(self.devices):
            return self.pod.fabric(())
        return self.pod.fabric(list(self.shape.build(self.devices).devices.flat))

    def workload(self, batch: int) -> Workload:
        """The workload of a batch on abstract devices."""
        run = dataclasses.replace(self.run, batch=batch)
        mesh = self.shape.abstract_mesh(self.pod.chips)
        return self.make_workload(run, mesh, self.pod.platform)

    def count(self, batch: int) -> Estimate:
        """The needs of a batch by its arrays, without compilation."""
        run, platform = dataclasses.replace(self.run, batch=batch), self.pod.platform
        workload = self.workload(batch)
        data, fsdp, _, sequence = self.sizes
        images = batch // (data * fsdp)
        self.on_progress(f'counting the arrays of {images} images')
        needs = analytic.program_needs(
            run, images, self.make_workload, platform, splits_rows=sequence > 1
        )
        fixed = analytic.fixed(run, workload, self.sizes)
        main = next(iter(workload.programs))
        return Estimate(
            images=images,
            workload=workload,
            temporaries={
                name: fixed * (name == main) + needs[name].live // sequence
                for name in workload.programs
            },
            traffic={
                name: analytic.traffic(run, workload, item.traffic, self.sizes)
                if name == main
                else item.traffic
                for name, item in needs.items()
            },
            collectives={main: analytic.collectives(run, workload, self.sizes, self.pod)},
            grid=self._grid(),
            complete=True,
            compile_seconds=0.0,
        )

    def _grid(self) -> int:
        """Bytes that a sample grid of the run needs, with its copies of the weights; 0: no grid."""
        run, (data, fsdp, _, sequence) = self.run, self.sizes
        if self.make_workload is not training or not run.pace.images:
            return 0
        images = -(-run.pace.images // (data * fsdp))  # filled up to a number that divides
        run = dataclasses.replace(run, batch=images * data * fsdp, remat='none')
        mesh, platform = self.shape.abstract_mesh(self.pod.chips), self.pod.platform
        self.on_progress(f'counting the arrays of a sample grid of {run.pace.images} images')
        resident = sampling(run, mesh, platform).resident
        needs = analytic.program_needs(run, images, sampling, platform, splits_rows=sequence > 1)
        copies = sum(map(device_bytes, resident.values()))
        return copies + sum(item.live for item in needs.values()) // sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """A compiled program, in bytes of one device.

    Attributes:
        arguments: bytes of its arguments.
        temporaries: bytes beside the arguments: temporaries, code and results that reuse no
            argument's memory.
        text: the program's text; None if it does not fit and compilation stopped.
        seconds: seconds that compilation took.
    """

    arguments: int
    temporaries: int
    text: HloText | None
    seconds: float


def compile_for(program: Program, arguments: int, devices: int, slices: int) -> Compiled:
    """Compiles a program for the devices of its arguments' shardings.

    Args:
        program: the function and its abstract arguments.
        arguments: bytes of the arguments on one device.
        devices: devices of all slices.
        slices: TPU slices.

    Raises:
        UserError: the compiler refuses the program for a reason other than too little memory.
    """
    start = time.monotonic()
    try:
        compiled = program.function.lower(*program.args).compile()
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        match = OUT_OF_MEMORY.search(str(error))
        if match is None:
            reason = str(error).partition('\n')[0]
            raise UserError(f'the compiler refuses the program: {reason}') from error
        temporaries, unit, used, used_unit = match.groups()
        size = float(temporaries or used) * UNITS[unit or used_unit or '']
        size -= arguments if used else 0
        return Compiled(
            arguments=arguments,
            temporaries=int(size),
            text=None,
            seconds=time.monotonic() - start,
        )
    memory = compiled.memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Compiled(
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes + results + memory.generated_code_size_in_bytes,
        text=HloText(compiled.as_text(), devices, slices),
        seconds=time.monotonic() - start,
    )
