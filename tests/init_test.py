"""A fresh model's tensors are distributed as the original's (STAR specification 5)."""

import gzip
import json

import jax
import numpy as np
import pytest
from flax.core import meta

from star_jax.convert.entries import to_state
from star_jax.convert.star import IGNORED, star_entries
from star_jax.core.condition import TextCondition
from star_jax.families.star import Refinement, Star
from star_jax.nn.positions import Learned

INIT = 'star/init_reference/star_init_stats.json.gz'


@pytest.fixture(scope='module')
def reference(golden):
    return json.loads(gzip.decompress((golden / INIT).read_bytes()))


def fresh_state(**options) -> dict[str, np.ndarray]:
    star = Star(
        width=256,
        heads=4,
        sides=(1, 2, 3, 4),
        codes=512,
        channels=32,
        text_width=96,
        **options,
    )
    inputs = np.zeros((1, star.schedule.length - 1, star.channels), np.float32)
    text = TextCondition(
        np.zeros((1, 2, 96), np.float32), np.ones((1, 2), np.int32), np.zeros((1, 96), np.float32)
    )
    params = jax.jit(star.build().init)(jax.random.key(1), inputs, text)['params']
    return to_state(star_entries(star), jax.tree.map(np.asarray, meta.unbox(params)))


def assert_like(state: dict[str, np.ndarray], statistics: dict) -> None:
    known = {name: entry for name, entry in statistics.items() if not name.endswith(IGNORED)}
    assert set(known) <= set(state)
    for name, entry in known.items():
        array, std = state[name], entry['std']
        assert list(array.shape) == entry['shape'], name
        # Six standard errors of the difference of two samples of this size.
        error = 6 * std / np.sqrt(array.size)
        assert abs(array.std() - std) <= error, (name, array.std(), std)
        assert abs(array.mean() - entry['mean']) <= error * 2**0.5 + 1e-6, name


def test_base_model_is_initialized_like_the_original(reference):
    state, statistics = fresh_state(depth=4), reference['stats']['base model (train_mode all)']
    assert_like(state, statistics)
    assert set(state) == {name for name in statistics if not name.endswith(IGNORED)}


def test_refinement_head_is_initialized_like_the_original(reference):
    """Only the head: its base model is loaded, and starts otherwise there."""
    state = fresh_state(depth=3, refinement=Refinement(first=2))
    kind = next(kind for kind in reference['stats'] if kind.startswith('with sampling head'))
    statistics = {name: it for name, it in reference['stats'][kind].items() if of_head(name)}
    assert_like(state, statistics)
    heads = {name for name in statistics if not name.endswith(IGNORED)}
    assert {name for name in state if of_head(name)} == heads


def of_head(name: str) -> bool:
    outer = ('word_embed_head', 'encoder_proj2', 'head_proj', 'head_logits2', 'lvl_embed_2')
    return name.startswith(('feat_extract_blocks', 'pos_start_last', *outer))


def test_shared_adaln_and_learned_positions_are_initialized_like_the_original(reference):
    state = fresh_state(depth=4, shared_adaln=True, positions=Learned())
    assert_like(state, reference['stats']['rotary_pos_emb=False, shared_aln=True'])
    gates, rest = np.split(state['blocks.0.ada_gss'], [2], axis=2)
    assert np.abs(gates).max() < 1e-4 < rest.std()
