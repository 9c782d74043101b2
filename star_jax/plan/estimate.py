"""What does a batch of a run ask of a device of a pod?"""

import dataclasses
from collections.abc import Callable, Sequence

import jax

from star_jax.nn.attention_dispatch import named
from star_jax.parallel.mesh import MeshShape, batch_shards
from star_jax.plan import analytic, compiled
from star_jax.plan.hlo import Collective
from star_jax.plan.topologies import Pod
from star_jax.plan.workload import Make, Work, share
from star_jax.training.run import Run


@dataclasses.dataclass(frozen=True)
class Point:
    """What a batch asks of one device. `beside`: bytes beside what is resident, by program."""

    images: int
    work: Work
    beside: dict[str, int]
    traffic: dict[str, int]
    exchanges: dict[str, list[Collective]]
    known: bool
    seconds: float

    @property
    def main(self) -> str:
        """The program that all is about."""
        return next(iter(self.beside))

    @property
    def temporaries(self) -> int:
        return max(self.beside.values())

    @property
    def total(self) -> int:
        """Bytes of a device in all."""
        return sum(map(share, self.work.resident.values())) + self.temporaries


@dataclasses.dataclass(frozen=True)
class Planner:
    """A run on a pod. `notice` is told what goes on."""

    run: Run
    pod: Pod
    make: Make
    shape: MeshShape
    devices: Sequence[jax.Device]
    notice: Callable[[str], None]

    def look(self, batch: int, alone: bool = False) -> Point:
        """The sizes of a batch; `alone` leaves out all programs but the first."""
        run, pod = dataclasses.replace(self.run, batch=batch), self.pod
        if pod.platform != 'tpu':
            return self._account(run)
        mesh = self.shape.build(self.devices)
        made = self.make(run, mesh, pod.platform)
        beside, traffic, exchanges, known, seconds = {}, {}, {}, True, 0.0
        for name, piece in list(made.pieces.items())[: 1 if alone else None]:
            self.notice(f'compiling the {name} for a batch of {batch}')
            built = compiled.build(piece, share(piece.args), pod.chips, pod.slices)
            beside[name] = built.temporaries
            known, seconds = known and built.text is not None, seconds + built.seconds
            traffic[name] = built.text.traffic() if built.text else 0
            exchanges[name] = built.text.collectives() if built.text else []
        images = batch // batch_shards(mesh)
        return Point(images, made, beside, traffic, exchanges, known, seconds)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The length of each axis of the mesh."""
        return self.shape.sizes(self.pod.chips)

    def fits(self, point: Point) -> bool:
        """Whether a device holds it all."""
        return point.total <= self.pod.chip.memory

    def _account(self, run: Run) -> Point:
        mesh = self.shape.abstract_mesh(self.pod.chips)
        named(run.attention, self.pod.platform)  # or a UserError: its kernels cannot be traced here
        made = self.make(dataclasses.replace(run, attention='automatic'), mesh, 'cpu')
        sizes = self.sizes
        images = run.batch // batch_shards(mesh)
        self.notice(f'counting the arrays of {images} images')
        local = analytic.local(self.run, images, self.make)
        always = analytic.fixed(run, made, sizes)
        main = next(iter(made.pieces))
        return Point(
            images=images,
            work=made,
            beside={
                name: always * (name == main) + local[name].live // sizes[3] for name in made.pieces
            },
            traffic={
                name: analytic.traffic(made, moved.moved, sizes) if name == main else moved.moved
                for name, moved in local.items()
            },
            exchanges={main: analytic.collectives(run, made, sizes, self.pod)},
            known=True,
            seconds=0.0,
        )
