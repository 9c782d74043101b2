"""Which machines does a topology name describe?

`v5p:4x4x4` is a TPU slice by its shape, `v5p-128` a slice by its product name (which counts
TensorCores of a v5p, two per chip, and chips of the others), `2xv5e-256` two such slices,
`8xA100-80G` eight GPUs.
"""

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Sequence

import jax
from jax.experimental import topologies

from star_jax.errors import UserError
from star_jax.parallel import links
from star_jax.parallel.chips import CHIPS, Chip

EXAMPLES = 'v5p:4x4x4, v5p-128, v5e-256, v6e:16x16, 2xv5e-256, 8xA100-80G or 64xH100'
# Shapes of slices by their number of chips (cloud.google.com/tpu/docs/v5e, /v5p).
SHAPES_2D = {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16)}
SHAPES_2D |= {256: (16, 16)}
SHAPES_3D = {4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4), 64: (4, 4, 4)}
SHAPES_3D |= {128: (4, 4, 8), 256: (4, 8, 8), 512: (8, 8, 8), 1024: (8, 8, 16)}
SHAPES_3D |= {2048: (8, 16, 16), 4096: (16, 16, 16)}
SHAPES = {'v5e': SHAPES_2D, 'v6e': SHAPES_2D, 'v5p': SHAPES_3D}
MAX_CHIPS = 2**17
CORES_PER_CHIP = {'v5p': 2}  # where product names count TensorCores
# Numbers of at most nine digits: Python converts no text of thousands of them.
TPU = re.compile(
    r'(?:(\d{1,9})x)?(v5e|v5litepod|v5p|v6e)(?::(\d{1,9}(?:x\d{1,9})*)|-(\d{1,9}))', re.ASCII
)
GPU = re.compile(r'(?:(\d{1,9})x)?([ah]\d+)(?:-(\d+)gb?)?', re.IGNORECASE | re.ASCII)
# libtpu reads these on a machine without a TPU; otherwise it waits for a metadata server.
ENVIRONMENT_WITHOUT_TPU = {
    'TPU_SKIP_MDS_QUERY': '1',
    'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
    'TPU_WORKER_HOSTNAMES': 'localhost',
    'TPU_MIN_LOG_LEVEL': '3',
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pod:
    """Accelerators of one kind: TPU slices or GPUs.

    Attributes:
        name: the topology name.
        chip: the kind of accelerator.
        shape: chips of one slice along each of its axes, or (number of GPUs,).
        slices: number of TPU slices.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        """Chips of all slices."""
        return self.slices * math.prod(self.shape)

    @property
    def platform(self) -> str:
        """JAX's name of the platform; programs for 'tpu' can be compiled on any machine."""
        return 'tpu' if self.chip.name in SHAPES else 'gpu'

    @property
    def local_chips(self) -> int:
        """Chips of one slice or node, which communicate over their own links."""
        return min(self.chip.chips_per_node or math.prod(self.shape), self.chips)

    @property
    def chips_per_host(self) -> int:
        """Chips of one host: four of a TPU pod, up to eight of a v5e or v6e slice on one host."""
        one_host = self.chips <= 8 and self.chip.name != 'v5p'
        most = self.chip.chips_per_node or (8 if one_host else 4)
        return min(most, self.chips)

    def fabric(self, devices: Sequence[jax.Device]) -> links.Fabric:
        """The links between its chips; `devices` are TPUs in the order of their mesh."""
        if self.platform == 'tpu' and len(devices):
            return links.torus(self.chip, self.shape, devices)
        return links.Switches(chip=self.chip)

    def devices(self) -> list[jax.Device]:
        """Abstract TPU devices: programs can be compiled for them, but not run.

        Raises:
            UserError: libtpu is not installed, or there is no such slice.
        """
        if importlib.util.find_spec('libtpu') is None:
            raise UserError(
                f'libtpu, which knows the chips of {self.name}, is not installed; run in '
                "the folder of this project: pip install -e '.[plan]'"
            )
        for name, value in ENVIRONMENT_WITHOUT_TPU.items():
            os.environ.setdefault(name, value)
        shape = 'x'.join(map(str, self.shape))
        options = {'num_slices': self.slices} if self.slices > 1 else {}
        if math.prod(self.shape) == 1:
            options['chips_per_host_bounds'] = (1, 1, 1)
        try:
            topology = topologies.get_topology_desc(
                platform='tpu', topology_name=f'{self.chip.name}:{shape}', **options
            )
        except jax.errors.JaxRuntimeError as error:
            reason = str(error).partition('\n')[0]
            raise UserError(
                f'there is no slice {self.name} ({reason}): give a topology such as {EXAMPLES}'
            ) from error
        return topology.devices


def parse_topology(name: str) -> Pod:
    """The machines that a topology name describes; UserError for an unknown name."""
    if match := TPU.fullmatch(name):
        slices, kind, shape, count = match.groups()
        kind = 'v5e' if kind == 'v5litepod' else kind
        sides = tuple(map(int, shape.split('x'))) if shape else _shape(name, kind, int(count))
        example = SHAPES[kind][64]
        if len(sides) != len(example):
            raise UserError(
                f'the shape of a {kind} slice has {len(example)} sides, such as '
                f'{kind}:{"x".join(map(str, example))}, not {name!r}'
            )
        return _pod(name, CHIPS[kind], sides, slices)
    if match := GPU.fullmatch(name):
        count, kind, memory = match.groups()
        chip_name = f'{kind.upper()}-{memory}G' if memory else kind.upper()
        chip_name = {'H100-80G': 'H100', 'H200-141G': 'H200'}.get(chip_name, chip_name)
        if chip_name in CHIPS:
            return _pod(name, CHIPS[chip_name], (int(count or 1),), None)
    raise UserError(f'unknown topology {name!r}: expected one such as {EXAMPLES}')


def _pod(name: str, chip: Chip, shape: tuple[int, ...], slices: str | None) -> Pod:
    pod = Pod(name=name, chip=chip, shape=shape, slices=int(slices or 1))
    if not 0 < pod.chips <= MAX_CHIPS:
        raise UserError(
            f'{name!r} has {pod.chips:,} chips, expected 1 to {MAX_CHIPS:,}: give a topology such '
            f'as {EXAMPLES}'
        )
    return pod


def _shape(name: str, kind: str, count: int) -> tuple[int, ...]:
    """The shape of a slice given by its product name."""
    cores, shapes = CORES_PER_CHIP.get(kind, 1), SHAPES[kind]
    if count % cores or count // cores not in shapes:
        sizes = ', '.join(str(size * cores) for size in shapes)
        unit = 'TensorCores, two per chip' if cores > 1 else 'chips'
        raise UserError(
            f'there is no slice {name!r}: {kind} names count {unit}, expected {sizes}; give any '
            f'other shape as in {kind}:{"x".join(map(str, shapes[64]))}'
        )
    return shapes[count // cores]
