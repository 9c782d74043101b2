"""With what settings is an image drawn?"""

import dataclasses
from typing import Literal

from star_jax.core.unmasking import Mode

Dtype = Literal['float32', 'bfloat16']  # of activations
Version = Literal['off', 'new', '1024']  # of stable sampling

EXTREME = 1e6  # beyond, logits are no float32 numbers any more


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stable:
    """Causal-driven stable sampling, for a model with a refinement head (STAR specification 9).

    Attributes:
        version: off; 'new': eight passes over a scale, all by the head; or '1024': 15 passes from
            scale 13 on, and before it the first five of eight by the base model.
        mode: how many tokens each pass fixes, from few to many.
        first: the first refined scale, counted from 0 (0: the first that the head was made for).
        last: the last one (0: the last of all).
        once: the base model's passes keep to their number of tokens; the published code fixes as
            many again, those that are most certain.
    """

    version: Version = 'off'
    mode: Mode = 'arccos'
    first: int = 0
    last: int = 0
    once: bool = False

    def __post_init__(self) -> None:
        if min(self.first, self.last) < 0:
            raise ValueError(
                f'stable.first and stable.last count scales from 0, not {self.first} and '
                f'{self.last}'
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How images are drawn.

    `guidance` is STAR's cfg: the weight grows from 0 at the first scale to `guidance` at the last;
    0 runs the prompts alone. `top_k` codes (0, or more than there are: all) and of those the most
    probable `top_p` of the mass (0: all) may be drawn, at `temperature`. `smooth` mixes code
    vectors instead of drawing codes and ignores the filters; pictures look cleaner and mean less.
    `stable` draws the finer scales in several passes.
    """

    guidance: float = 4.0
    top_k: int = 600
    top_p: float = 0.8
    temperature: float = 1.0
    smooth: bool = False
    stable: Stable = Stable()

    def __post_init__(self) -> None:
        if not 0 <= self.guidance <= EXTREME:
            raise ValueError(f'guidance must lie in [0, {EXTREME:g}], not {self.guidance}')
        if self.top_k < 0:
            raise ValueError(f'top_k must not be negative (0: all), not {self.top_k}')
        if not 0 <= self.top_p <= 1:
            raise ValueError(f'top_p must lie in [0, 1], not {self.top_p}')
        if not 1 / EXTREME <= self.temperature <= EXTREME:
            raise ValueError(
                f'temperature must lie in [{1 / EXTREME:g}, {EXTREME:g}], not {self.temperature}'
            )
