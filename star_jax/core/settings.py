"""With what settings is an image drawn?"""

import dataclasses

EXTREME = 1e6  # beyond, logits are no float32 numbers any more


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How images are drawn.

    `guidance` is STAR's cfg: the weight grows from 0 at the first scale to `guidance` at the last;
    0 runs the prompts alone. `top_k` codes (0, or more than there are: all) and of those the most
    probable `top_p` of the mass (0: all) may be drawn, at `temperature`. `smooth` mixes code
    vectors instead of drawing codes and ignores the filters; pictures look cleaner and mean less.
    """

    guidance: float = 4.0
    top_k: int = 600
    top_p: float = 0.8
    temperature: float = 1.0
    smooth: bool = False

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
