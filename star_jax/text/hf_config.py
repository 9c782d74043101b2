"""What does the config.json of a text encoder contain?

An absent field has the default of transformers' own configuration. Each function that reads a
field raises `UserError` for an invalid value.
"""

from collections.abc import Mapping
from typing import Any

from star_jax.core.sizes import LARGEST, MOST_LAYERS
from star_jax.errors import UserError

# The sizes of encoders of published models, by the width of their states, for plans and benchmarks
# on machines without the files: OpenCLIP ViT-H/14 as in Stable Diffusion 2.1 (STAR), flan-t5-xl,
# and MiniLM, the encoder of the shipped weights.
PUBLISHED: Mapping[int, Mapping[str, Any]] = {
    1024: {
        'model_type': 'clip_text_model',
        'hidden_size': 1024,
        'intermediate_size': 4096,
        'num_attention_heads': 16,
        'num_hidden_layers': 23,
        'hidden_act': 'gelu',
    },
    2048: {
        'model_type': 't5',
        'd_model': 2048,
        'd_ff': 5120,
        'd_kv': 64,
        'num_heads': 32,
        'num_layers': 24,
        'feed_forward_proj': 'gated-gelu',
    },
    384: {
        'model_type': 'bert',
        'hidden_size': 384,
        'intermediate_size': 1536,
        'num_attention_heads': 12,
        'num_hidden_layers': 6,
    },
}


def size(config: Mapping, name: str, default: int) -> int:
    """A field that is a count; UserError for what is none."""
    value = config.get(name, default)
    if type(value) is not int or not 1 <= value <= LARGEST:
        raise UserError(
            f'{name} is {value!r} in the text encoder; expected a whole number in [1, {LARGEST}].'
        )
    return value


def depth(config: Mapping, name: str, default: int) -> int:
    """A field that is a number of layers; UserError for what is none."""
    value = size(config, name, default)
    if value > MOST_LAYERS:
        raise UserError(
            f'{name} is {value:,} in the text encoder; expected at most {MOST_LAYERS:,} layers.'
        )
    return value


def token_id(config: Mapping, name: str, default: int) -> int:
    """A field that holds a token id (null: the default); UserError for what is none."""
    value = config.get(name, default)
    value = default if value is None else value
    if type(value) is not int or value < 0:
        raise UserError(f'{name} is {value!r} in the text encoder; expected a token id.')
    return value


def epsilon(config: Mapping, name: str, default: float) -> float:
    """The number that a norm adds to the variance; UserError unless it lies in (0, 1)."""
    value = config.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise UserError(f'{name} is {value!r} in the text encoder; expected a number in (0, 1).')
    return value


def choice(config: Mapping, name: str, default: str, options: Mapping[str, Any]) -> Any:
    """The option that a field names; UserError for an unknown one."""
    value = config.get(name, default)
    if not isinstance(value, str) or value not in options:
        raise UserError(f'{name} is {value!r} in the text encoder; supported: {sorted(options)}.')
    return options[value]


def num_heads(config: Mapping, width: int, default: int) -> int:
    """The number of attention heads; UserError unless it divides the width."""
    count = size(config, 'num_attention_heads', default)
    if width % count:
        raise UserError(f'a text encoder of width {width} does not divide into {count} heads.')
    return count
