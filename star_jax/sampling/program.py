"""Which one jitted program draws images?"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from star_jax.core import condition, pixels
from star_jax.core.buckets import Buckets
from star_jax.core.condition import TextCondition
from star_jax.nn.transformer import Transformer
from star_jax.sampling.methods import SamplingMethod
from star_jax.sampling.sampler import sample

SEEDS = 2**32  # below which they lie
HEAVY = ('blocks', 'to_logits', 'merge')  # parts whose products are in the compute dtype
EXACT = ('norm_out', 'conv_out')  # of the decoder: eight bits of a pixel are all of bfloat16's

# (params, keys_B, prompted, unprompted or None, guidance_S, draw) -> uint8 [B, H, W, 3]
Program = Callable[..., jax.Array]


def compile_program(model: Transformer, tokenizer: nn.Module, buckets: Buckets = ()) -> Program:
    """From encoded text to pixels; compiled once per batch size, top-k and kind of draw.

    The scales of each bucket share one body. Raises UserError for buckets that there cannot be,
    the program where its draw tells the scales of a bucket apart.

    Without `unprompted` (one row) only the prompted rows are run and there is no guidance. Where a
    model mixes the rows of a batch, every image is a batch of its own, and what splits a batch over
    devices has no say inside it.
    """
    model.schedule.groups(shared=buckets)
    if model.mixes_rows:
        return jax.jit(
            functools.partial(_draw_one_by_one, model.with_sharding(None), tokenizer, buckets)
        )
    return jax.jit(functools.partial(_draw_images, model, tokenizer, buckets))


def image_keys(seeds: Sequence[int]) -> jax.Array:
    """One key per image: a seed (modulo 2^32) draws its image again, alone or in any batch."""
    return jax.vmap(jax.random.key)(jnp.asarray(np.asarray(seeds) % SEEDS, jnp.uint32))


def cast(params: dict, dtype: str) -> dict:
    """Those of 'model' and 'tokenizer' in the compute dtype, once, before the program.

    Of the network the kernels of layers and head, of the tokenizer its decoder but for the layers
    that make the pixels. Everything else works in float32 and stays so: embeddings, positions,
    score scales, codes, the canvas.
    """

    def convert(path: tuple, x: jax.Array) -> jax.Array:
        whose, *names = [key.key for key in path]
        if whose == 'tokenizer':
            heavy = names[0] == 'decoder' and names[1] not in EXACT
        else:
            inside = any(name in HEAVY for name in names[:2])  # of the network or its refiner
            heavy = inside and names[-1] == 'kernel'
        return x.astype(dtype) if heavy else x

    return jax.tree_util.tree_map_with_path(convert, params)


def _draw_images(
    model: Transformer,
    tokenizer: nn.Module,
    buckets: Buckets,
    params: dict,
    keys_B: jax.Array,
    prompted: TextCondition,
    unprompted: TextCondition | None,
    guidance_S: jax.Array,
    draw: SamplingMethod,
) -> jax.Array:
    rows = prompted if unprompted is None else condition.stack(prompted, unprompted)
    drawn = sample(model, tokenizer, params, keys_B, rows, guidance_S, draw, buckets=buckets)
    return pixels.to_uint8(drawn.images)


def _draw_one_by_one(
    model: Transformer,
    tokenizer: nn.Module,
    buckets: Buckets,
    params: dict,
    keys_B: jax.Array,
    prompted: TextCondition,
    unprompted: TextCondition | None,
    guidance_S: jax.Array,
    draw: SamplingMethod,
) -> jax.Array:
    def draw_one(key: jax.Array, text: TextCondition) -> jax.Array:
        text = jax.tree.map(lambda x: x[None], text)
        own = (params, key[None], text, unprompted, guidance_S, draw)
        return _draw_images(model, tokenizer, buckets, *own)[0]

    return jax.vmap(draw_one)(keys_B, prompted)
