"""Does the loop of a raster's sampling program read weights and cache in place?"""

import importlib.util
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import linen as nn

from star_jax.core import condition
from star_jax.core.condition import LabelCondition
from star_jax.core.guidance import StepSettings
from star_jax.core.settings import Settings
from star_jax.families.llamagen import LlamaGen
from star_jax.nn.bind import bind
from star_jax.parallel.mesh import MeshShape
from star_jax.plan import topologies
from star_jax.sampling import trunks, weight_layout
from star_jax.sampling.methods import FilteredSampling
from star_jax.sampling.program import abstract_cast, image_keys
from star_jax.sampling.sampler import sample
from star_jax.verify.llamagen_generate import CodesAlone

# Every weight matrix and every block of the cache has at least so many elements, and every other
# array of a step has fewer.
LEAST = 4096
MODEL = LlamaGen(depth=2, width=128, heads=4, hidden=256, grid=(6, 6), codes=300, classes=3)
XL = LlamaGen.published('XL', depth=2, grid=(8, 8), codes=1024, classes=3)
ON_CHIP = 'S(1)'  # the fast memory of a TPU, in the layout of an array
LIBTPU = Path(__file__).parents[1] / '.cache' / 'libtpu'  # where launch/test.sh puts it


def compiled(mesh=None, model=MODEL, dtype='float32', device=None) -> Any:
    """A compiled program that samples one image with guidance, for a device if one is given."""
    network = model.build(dtype).with_sharding(mesh)
    tokenizer = CodesAlone(model.schedule, model.vocabulary)
    settings = StepSettings(model.guidance_weights(4.0), model.temperatures(1.0))
    method = FilteredSampling(model.filter(Settings(top_k=0, top_p=0.0)))

    def run(params, keys_B, labels):
        empty = LabelCondition(np.int32([model.classes]))
        unprompted = bind(network, params['model']).unprompted(labels, empty)
        rows = condition.stack(labels, unprompted)
        return sample(
            network,
            tokenizer,
            params,
            keys_B=keys_B,
            condition=rows,
            settings=settings,
            method=method,
        ).codes

    params = {'model': nn.unbox(model.abstract()), 'tokenizer': {}}
    platform = device.platform if device else 'cpu'
    params = weight_layout.arrange(abstract_cast(params, dtype), model.schedule, platform)
    keys_B = jax.eval_shape(lambda: image_keys([0]))
    labels = LabelCondition(jax.ShapeDtypeStruct((1,), np.int32))
    args = (params, keys_B, labels)
    if device is not None:
        sharding = jax.sharding.SingleDeviceSharding(device)
        args = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args
        )
    return jax.jit(run).lower(*args).compile()


def large_results(text: str, least: int = LEAST) -> list[str]:
    """The operations inside of loops that make an array of at least `least` elements."""
    computations: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if match := re.match(r'(?:ENTRY )?%?([\w.\-]+) .*\{$', line):
            lines = computations[match[1]] = []
        elif line.startswith('  '):
            lines.append(line)
    pending, seen, found = set(re.findall(r'body=%?([\w.\-]+)', text)), set(), []
    assert pending
    while pending:
        seen.add(name := pending.pop())
        for line in computations[name]:
            if ' fusion(' not in line:
                called = re.findall(r'(?:calls|to_apply|body|condition)=%?([\w.\-]+)', line)
                pending |= set(called) - seen
            result = re.search(r'= \w+\[([\d,]*)\]\S* ([\w\-]+)\(', line)
            if result and result[2] not in ('parameter', 'get-tuple-element', 'bitcast'):
                size = np.prod([int(n) for n in result[1].split(',') if n])
                found += [line.strip()] if size >= least else []
    return found


@pytest.mark.parametrize('mesh', [None, MeshShape(data=1)], ids=['no mesh', 'one device'])
def test_no_weight_and_no_block_of_the_cache_is_copied_in_the_loop(mesh, monkeypatch):
    monkeypatch.setattr(trunks, 'PIECE_ROWS', 16)
    program = compiled(mesh and mesh.build(jax.devices()[:1]))
    text = program.as_text()
    found = large_results(text)
    assert [line for line in found if 'dynamic-update-slice' in line]  # the writes in place
    assert not [line for line in found if 'dynamic-update-slice' not in line]
    assert re.search(r'f32\[2,4,16,32\]', text)
    cache = 2 * MODEL.depth * 2 * MODEL.schedule.length * MODEL.width * 4  # bytes
    assert program.memory_analysis().temp_size_in_bytes <= 1.3 * cache


def test_deep_models_have_fewer_and_longer_pieces(monkeypatch):
    monkeypatch.setattr(trunks, 'PIECE_ROWS', 4)
    monkeypatch.setattr(trunks, 'MOST_BODIES', 3 * MODEL.depth)
    text = compiled().as_text()
    assert re.search(r'f32\[2,4,12,32\]', text) and not re.search(r'f32\[2,4,4,32\]', text)


@pytest.mark.slow
@pytest.mark.usefixtures('compiled_here')  # programs for a TPU are written to a cache, never read
@pytest.mark.skipif(
    not (LIBTPU.exists() or importlib.util.find_spec('libtpu')),
    reason="libtpu compiles for TPUs: launch/test.sh fetches it, or pip install -e '.[plan]'",
)
def test_a_tpu_copies_no_weight_and_no_block_in_the_loop(monkeypatch):
    """At the width of GPT-XL: what is large in the loop is fetched or written in fast memory.

    Pieces have no axis that a TPU would fill up: two heads of 64 channels are side by side.
    """
    if LIBTPU.exists():
        monkeypatch.syspath_prepend(str(LIBTPU))
    monkeypatch.setattr(trunks, 'PIECE_ROWS', 16)
    device = topologies.parse_topology('v5e-1').devices()[0]
    program = compiled(model=XL, dtype='bfloat16', device=device)
    of_piece = 2 * XL.heads * trunks.PIECE_ROWS * XL.head_width
    text = program.as_text()
    results = large_results(text, of_piece)
    assert results and not [line for line in results if ON_CHIP not in line.partition('(%')[0]]
    assert f'bf16[2,{XL.heads // 2},{trunks.PIECE_ROWS},128]' in text
    assert f'bf16[2,{XL.heads},{trunks.PIECE_ROWS},64]' not in text
