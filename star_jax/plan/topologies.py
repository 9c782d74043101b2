"""Which machines does a name mean?

`v5p:4x4x4` is a slice by its shape, `v5p-128` one by its product name (TensorCores of a v5p, which
has two on a chip, otherwise chips), `2xv5e-256` two such slices, `8xA100-80G` so many GPUs.
"""

import dataclasses
import importlib.util
import math
import os
import re

import jax
from jax.experimental import topologies

from star_jax.errors import UserError
from star_jax.plan.chips import CHIPS, Chip

EXAMPLES = 'v5p:4x4x4, v5p-128, v5e-256, v6e:16x16, 2xv5e-256, 8xA100-80G or 64xH100'
# Slices by their chips (cloud.google.com/tpu/docs/v5e, /v5p).
FLAT = {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16)}
FLAT |= {256: (16, 16)}
DEEP = {4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4), 64: (4, 4, 4), 128: (4, 4, 8)}
DEEP |= {256: (4, 8, 8), 512: (8, 8, 8), 1024: (8, 8, 16), 2048: (8, 16, 16), 4096: (16, 16, 16)}
SHAPES = {'v5e': FLAT, 'v6e': FLAT, 'v5p': DEEP}
MOST_CHIPS = 2**17
CORES = {'v5p': 2}  # on a chip, where product names count them
TPU = re.compile(r'(?:(\d+)x)?(v5e|v5litepod|v5p|v6e)(?::(\d+(?:x\d+)*)|-(\d+))')
GPU = re.compile(r'(?:(\d+)x)?([ah]\d+)(?:-(\d+)gb?)?', re.IGNORECASE)
# The compiler asks for these where there is no TPU, and would wait for a server of the cloud.
NO_TPU = {
    'TPU_SKIP_MDS_QUERY': '1',
    'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
    'TPU_WORKER_HOSTNAMES': 'localhost',
    'TPU_MIN_LOG_LEVEL': '3',
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
}


@dataclasses.dataclass(frozen=True)
class Pod:
    """`slices` of `chip`s in this `shape`, or as many GPUs as the shape says."""

    name: str
    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        return self.slices * math.prod(self.shape)

    @property
    def platform(self) -> str:
        """As JAX calls it; programs for a 'tpu' can be compiled on any machine."""
        return 'tpu' if self.chip.name in SHAPES else 'gpu'

    @property
    def near(self) -> int:
        """Chips that reach each other over their own links."""
        return min(self.chip.near or math.prod(self.shape), self.chips)

    def devices(self) -> list[jax.Device]:
        """Stand-ins for the TPUs, for which programs can be compiled but not run.

        Raises UserError where there is no compiler for them, or no such slice.
        """
        if importlib.util.find_spec('libtpu') is None:
            raise UserError(
                f'programs for {self.name} are compiled by libtpu, which is not installed; run in '
                "the folder of this project: pip install -e '.[plan]'"
            )
        for name, value in NO_TPU.items():
            os.environ.setdefault(name, value)
        shape = 'x'.join(map(str, self.shape))
        options = {'num_slices': self.slices} if self.slices > 1 else {}
        if math.prod(self.shape) == 1:
            options['chips_per_host_bounds'] = (1, 1, 1)
        try:
            found = topologies.get_topology_desc(
                platform='tpu', topology_name=f'{self.chip.name}:{shape}', **options
            )
        except jax.errors.JaxRuntimeError as error:
            reason = str(error).partition('\n')[0]
            raise UserError(
                f'there is no slice {self.name} ({reason}): name one such as {EXAMPLES}'
            ) from error
        return found.devices


def read(name: str) -> Pod:
    """The machines that a name means; UserError where it means none."""
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
        chosen = f'{kind.upper()}-{memory}G' if memory else kind.upper()
        chosen = {'H100-80G': 'H100', 'H200-141G': 'H200'}.get(chosen, chosen)
        if chosen in CHIPS:
            return _pod(name, CHIPS[chosen], (int(count or 1),), None)
    raise UserError(f'there is no topology {name!r}: expected one such as {EXAMPLES}')


def _pod(name: str, chip: Chip, shape: tuple[int, ...], slices: str | None) -> Pod:
    pod = Pod(name, chip, shape, int(slices or 1))
    if not 0 < pod.chips <= MOST_CHIPS:
        raise UserError(
            f'{name!r} has {pod.chips:,} chips, expected 1 to {MOST_CHIPS:,}: give a topology such '
            f'as {EXAMPLES}'
        )
    return pod


def _shape(name: str, kind: str, count: int) -> tuple[int, ...]:
    """The shape of a slice by its product name."""
    cores, shapes = CORES.get(kind, 1), SHAPES[kind]
    if count % cores or count // cores not in shapes:
        sizes = ', '.join(str(size * cores) for size in shapes)
        counted = 'TensorCores, two per chip' if cores > 1 else 'chips'
        raise UserError(
            f'there is no slice {name!r}: a {kind} counts {counted}, expected {sizes}; another '
            f'shape is named as in {kind}:{"x".join(map(str, shapes[64]))}'
        )
    return shapes[count // cores]
