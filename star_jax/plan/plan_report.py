"""What is a plan, in numbers?"""

import dataclasses
from typing import Any

from star_jax.plan.chips import Chip
from star_jax.plan.hlo import Collective


@dataclasses.dataclass(frozen=True, kw_only=True)
class Roof:
    """Seconds that a program takes at least, for each thing that it asks of a chip."""

    compute: float
    memory: float
    links: float
    network: float

    @property
    def seconds(self) -> float:
        """As if everything went on side by side."""
        return max(self.compute, self.memory, self.links, self.network)

    @property
    def limit(self) -> str:
        """What takes longest."""
        return max(dataclasses.asdict(self).items(), key=lambda item: item[1])[0]


def roof(
    chip: Chip, chips: int, flops: dict[str, int], traffic: int, exchanges: list[Collective]
) -> Roof:
    """`flops` are those of all chips by kind, `traffic` and `exchanges` those of one."""
    far = [one for one in exchanges if one.near < one.group]
    return Roof(
        compute=sum(count / chip.rate(kind) for kind, count in flops.items()) / chips,
        memory=traffic / chip.bandwidth,
        links=sum(one.bytes for one in exchanges if one.near > 1) / chip.links,
        network=sum(one.bytes / one.near for one in far) / chip.network,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one device. `activations` grow with the batch, `temporaries` do not."""

    resident: dict[str, int]
    activations: int
    temporaries: int
    limit: int

    @property
    def total(self) -> int:
        return sum(self.resident.values()) + self.activations + self.temporaries

    @property
    def fits(self) -> bool:
        return self.total <= self.limit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """A run on machines.

    `parted`: whether activations could be told from temporaries (else they count as activations).
    `largest` batch that fits (0: none does, None: not looked for), `checked` by compiling it.
    `roofs` by program, which run one after another. `needed`: floating-point operations that
    must be computed once. `hours` of all chips for the whole run, or for a million images drawn.
    """

    config: str
    topology: str
    chips: int
    compiled: bool
    mesh: dict[str, int]
    batch: int
    memory: Memory
    parted: bool
    largest: int | None
    checked: bool
    exchanges: list[Collective]
    known: bool
    roofs: dict[str, Roof]
    flops: int
    needed: int
    peak: float
    steps: int
    price: float
    compile_seconds: float
    notes: list[str]
    advice: list[str]

    @property
    def seconds(self) -> float:
        """Of a step, at least."""
        return sum(roof.seconds for roof in self.roofs.values())

    @property
    def mfu(self) -> float:
        """The share of the chips' bfloat16 rate that the needed arithmetic reaches, at most."""
        return self.needed / (self.seconds * self.chips * self.peak)

    @property
    def images_per_second(self) -> float:
        return self.batch / self.seconds

    @property
    def hours(self) -> float:
        return self.seconds * self.steps * self.chips / 3600

    def to_json(self) -> dict[str, Any]:
        """Everything, what follows from other numbers too."""
        derived = ('seconds', 'mfu', 'images_per_second', 'hours')
        memory = {'total': self.memory.total, 'fits': self.memory.fits}
        return dataclasses.asdict(self) | {
            'predicted': {name: getattr(self, name) for name in derived},
            'memory': dataclasses.asdict(self.memory) | memory,
        }
