"""Which one jitted program draws images?"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

from star_jax.core import condition, pixels
from star_jax.core.condition import Text
from star_jax.nn.transformer import Transformer
from star_jax.sampling.draw import Draw
from star_jax.sampling.sampler import sample

# (params, keys_B, prompted, unprompted or None, guidance_S, draw) -> uint8 [B, H, W, 3]
Program = Callable[..., jax.Array]


def compile_program(model: Transformer, tokenizer: nn.Module) -> Program:
    """From encoded text to pixels; compiled once per batch size, top-k and kind of draw.

    Without `unprompted` (one row) only the prompted rows are run and there is no guidance.
    """
    return jax.jit(functools.partial(_draw_images, model, tokenizer))


def image_keys(seeds: Sequence[int]) -> jax.Array:
    """One key per image: a seed draws its image again, alone or in any batch."""
    return jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))


def cast(params: dict, dtype: str) -> dict:
    """Parameters of the network in the compute dtype, once, before the program."""
    return jax.tree.map(lambda x: x.astype(dtype), params)


def _draw_images(
    model: Transformer,
    tokenizer: nn.Module,
    params: dict,
    keys_B: jax.Array,
    prompted: Text,
    unprompted: Text | None,
    guidance_S: jax.Array,
    draw: Draw,
) -> jax.Array:
    rows = prompted if unprompted is None else condition.stack(prompted, unprompted)
    drawn = sample(model, tokenizer, params, keys_B, rows, guidance_S, draw)
    return pixels.to_uint8(drawn.images)
