"""Do the conversion tables have exactly the published tensors (STAR specification 10)?"""

import gzip
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from star_jax.convert.entries import to_state
from star_jax.convert.star import IGNORED, star_entries, vq_entries
from star_jax.core.condition import TextCondition
from star_jax.families.star import Star
from star_jax.tokenizers.residual_vq import VQ

D30 = {'depth': 30, 'width': 1920, 'heads': 30}
SIDES_1024 = (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64)
CLASSES = 1001  # rows of the unused class_emb.weight, which counts as a parameter


def published(golden, name: str) -> dict[str, tuple[int, ...]]:
    text = gzip.decompress((golden / 'star' / 'names' / f'{name}.txt.gz').read_bytes()).decode()
    lines = [line.split(' | ') for line in text.splitlines() if not line.startswith('#')]
    return {line[0]: tuple(json.loads(line[1])) for line in lines if not line[0].endswith(IGNORED)}


def placeholders(abstract):
    """Arrays of these shapes that use no memory."""
    return jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), meta.unbox(abstract))


def shapes(state) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in state.items()}


def count(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ('name', 'star', 'parameters'),
    [
        ('star_d16_256', Star(), 274_934_272),
        ('star_d30_256_or_512', Star(**D30), 1_678_731_016),
        ('star_d30_1024', Star(**D30, sides=SIDES_1024), 1_678_738_696),
    ],
)
def test_star_entries_equal_the_published_names(golden, name, star, parameters):
    text = TextCondition(
        jax.ShapeDtypeStruct((1, 77, star.text_width), jnp.float32),
        jax.ShapeDtypeStruct((1, 77), jnp.int32),
        jax.ShapeDtypeStruct((1, star.text_width), jnp.float32),
    )
    inputs = jax.ShapeDtypeStruct((1, star.schedule.length - 1, star.channels), jnp.float32)
    params = placeholders(
        jax.eval_shape(star.build().init, jax.random.key(0), inputs, text)['params']
    )
    assert shapes(to_state(star_entries(star), params)) == published(golden, name)
    assert count(params) + CLASSES * star.width == parameters


def test_vq_entries_equal_the_published_names(golden):
    vq = VQ()
    names = published(golden, 'vae_ch160v4096z32')
    pixels = jax.ShapeDtypeStruct((1, *vq.resolution, 3), jnp.float32)
    params = placeholders(jax.eval_shape(vq.build().init, jax.random.key(0), pixels)['params'])
    assert shapes(to_state(vq_entries(vq, names), params)) == names
    assert count(params) == 108_948_355
