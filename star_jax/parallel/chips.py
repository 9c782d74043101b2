"""What are the peak rates and the memory of one accelerator?"""

import dataclasses
from typing import Any

from star_jax.parallel.flags import MEMORY_FRACTION

GIB = 2**30
TERA, GIGA = 1e12, 1e9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """Peak rates of an accelerator as its vendor publishes them, and the memory a program can use.

    Attributes:
        name: the name in topologies, such as v5p or A100-80G.
        bfloat16: FLOP/s of dense matrix products in bfloat16.
        float32: FLOP/s of dense products of float32 arrays with JAX's default precision.
        exact: FLOP/s of dense products with every bit of float32 (precision 'highest').
        memory: bytes that a program can use.
        bandwidth: bytes/s of that memory.
        links: bytes/s that the chip sends to chips of its slice or node, over all its links; a
            collective of a TPU slice uses those of its axes alone (`parallel.links`).
        network: bytes/s that the chip sends to another slice or node.
        kinds: JAX's names of this kind of device.
        axes: axes of a TPU slice, along which a chip has neighbours.
        chips_per_node: chips that share fast links (0: all chips of a slice do).
    """

    name: str
    bfloat16: float
    float32: float
    exact: float
    memory: float
    bandwidth: float
    links: float
    network: float
    kinds: tuple[str, ...]
    axes: int = 0
    chips_per_node: int = 0

    def rate(self, kind: str) -> float:
        """FLOP/s of products of one kind, as `core.flops.count_kinds` names the kinds."""
        return getattr(self, kind)


def _tpu(name: str, bfloat16: float, **fields: Any) -> Chip:
    """A TPU, which multiplies bfloat16: float32 takes one pass by default and six for all bits."""
    return Chip(name=name, bfloat16=bfloat16, float32=bfloat16, exact=bfloat16 / 6, **fields)


# TPUs: cloud.google.com/tpu/docs/v5e, /v5p, /v6e (peak bf16, HBM bandwidth, interchip interconnect:
# 1,600, 4,800 and 3,200 Gbit/s per chip); memory as their compiler reports it ("exceeds available
# HBM (15.75G)"); network of a chip to other slices from jax-ml.github.io/scaling-book (part 2, "TPU
# networking"). GPUs: data sheets of A100, H100 and H200 in SXM (dense rates; float32 is TF32 by
# default); NVLink in one direction; the fraction of the memory CUDA reports that the launch scripts
# give XLA; one network card of 200 Gbit/s (A100) or 400 Gbit/s per GPU, as in the DGX systems.
CHIPS = {
    chip.name: chip
    for chip in (
        _tpu(
            'v5e',
            197 * TERA,
            memory=15.75 * GIB,
            bandwidth=819 * GIGA,
            links=200 * GIGA,
            network=3.125 * GIGA,
            kinds=('TPU v5 lite', 'TPU v5e'),
            axes=2,
        ),
        _tpu(
            'v5p',
            459 * TERA,
            memory=95.74 * GIB,
            bandwidth=2_765 * GIGA,
            links=600 * GIGA,
            network=6.25 * GIGA,
            kinds=('TPU v5', 'TPU v5p'),
            axes=3,
        ),
        _tpu(
            'v6e',
            918 * TERA,
            memory=31.25 * GIB,
            bandwidth=1_600 * GIGA,
            links=400 * GIGA,
            network=12.5 * GIGA,
            kinds=('TPU v6 lite', 'TPU v6e'),
            axes=2,
        ),
        Chip(
            name='A100-40G',
            bfloat16=312 * TERA,
            float32=156 * TERA,
            exact=19.5 * TERA,
            memory=MEMORY_FRACTION * 39.4 * GIB,
            bandwidth=1_555 * GIGA,
            links=300 * GIGA,
            network=25 * GIGA,
            kinds=('NVIDIA A100-SXM4-40GB',),
            chips_per_node=8,
        ),
        Chip(
            name='A100-80G',
            bfloat16=312 * TERA,
            float32=156 * TERA,
            exact=19.5 * TERA,
            memory=MEMORY_FRACTION * 79.2 * GIB,
            bandwidth=2_039 * GIGA,
            links=300 * GIGA,
            network=25 * GIGA,
            kinds=('NVIDIA A100-SXM4-80GB',),
            chips_per_node=8,
        ),
        Chip(
            name='H100',
            bfloat16=989 * TERA,
            float32=494 * TERA,
            exact=67 * TERA,
            memory=MEMORY_FRACTION * 79.1 * GIB,
            bandwidth=3_350 * GIGA,
            links=450 * GIGA,
            network=50 * GIGA,
            kinds=('NVIDIA H100 80GB HBM3',),
            chips_per_node=8,
        ),
        Chip(
            name='H200',
            bfloat16=989 * TERA,
            float32=494 * TERA,
            exact=67 * TERA,
            memory=MEMORY_FRACTION * 139.8 * GIB,
            bandwidth=4_800 * GIGA,
            links=450 * GIGA,
            network=50 * GIGA,
            kinds=('NVIDIA H200',),
            chips_per_node=8,
        ),
    )
}


def chip_of(device_kind: str) -> Chip | None:
    """The chip that JAX calls so, or None for an unknown one."""
    return next((chip for chip in CHIPS.values() if device_kind in chip.kinds), None)
