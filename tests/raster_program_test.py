"""Does the loop of a raster's sampling program read weights and cache in place?"""

import re

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
from star_jax.sampling import trunks
from star_jax.sampling.methods import FilteredSampling
from star_jax.sampling.program import image_keys
from star_jax.sampling.sampler import sample
from star_jax.verify.llamagen_generate import CodesAlone

# Every weight matrix and every block of the cache has at least so many elements, and every other
# array of a step has fewer.
LEAST = 4096
MODEL = LlamaGen(depth=2, width=128, heads=4, hidden=256, grid=(6, 6), codes=300, classes=3)


def compiled(mesh=None) -> str:
    """The compiled text of a program that samples one image with guidance."""
    network = MODEL.build().with_sharding(mesh)
    tokenizer = CodesAlone(MODEL.schedule, MODEL.vocabulary)
    settings = StepSettings(MODEL.guidance_weights(4.0), MODEL.temperatures(1.0))
    method = FilteredSampling(MODEL.filter(Settings(top_k=0, top_p=0.0)))

    def run(params, keys_B, labels):
        empty = LabelCondition(np.int32([MODEL.classes]))
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

    params = trunks.split({'model': nn.unbox(MODEL.abstract()), 'tokenizer': {}})
    keys_B = jax.eval_shape(lambda: image_keys([0]))
    labels = LabelCondition(jax.ShapeDtypeStruct((1,), np.int32))
    return jax.jit(run).lower(params, keys_B, labels).compile().as_text()


def large_results(text: str) -> list[str]:
    """The operations inside of loops that make an array of at least LEAST elements."""
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
                found += [line.strip()] if size >= LEAST else []
    return found


@pytest.mark.parametrize('mesh', [None, MeshShape(data=1)], ids=['no mesh', 'one device'])
def test_no_weight_and_no_block_of_the_cache_is_copied_in_the_loop(mesh, monkeypatch):
    monkeypatch.setattr(trunks, 'BLOCK_ROWS', 16)
    text = compiled(mesh and mesh.build(jax.devices()[:1]))
    found = large_results(text)
    assert [line for line in found if 'dynamic-update-slice' in line]  # the writes in place
    assert not [line for line in found if 'dynamic-update-slice' not in line]
    assert re.search(r'f32\[2,4,16,32\]', text)
