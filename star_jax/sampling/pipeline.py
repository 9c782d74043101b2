"""Prompts in, images out: what does a user hold?"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from star_jax.checkpoint import folder, models
from star_jax.core.codes import Index
from star_jax.core.filters import Filter
from star_jax.errors import UserError
from star_jax.sampling import draw, program
from star_jax.text import TextEncoder
from star_jax.text import load as load_text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How images are drawn.

    `guidance` is STAR's cfg: the weight grows from 0 at the first scale to `guidance` at the last;
    0 runs the prompts alone. `top_k` codes (0: all) and of those the most probable `top_p` of the
    mass (0: all) may be drawn, at `temperature`. `smooth` mixes code vectors instead of drawing
    codes and ignores the filters; pictures look cleaner and mean less.
    """

    guidance: float = 4.0
    top_k: int = 600
    top_p: float = 0.8
    temperature: float = 1.0
    smooth: bool = False

    def __post_init__(self) -> None:
        if self.guidance < 0 or self.top_k < 0:
            raise ValueError(f'guidance and top_k must not be negative: {self}')
        if not 0 <= self.top_p <= 1:
            raise ValueError(f'top_p must lie in [0, 1], not {self.top_p}')
        if self.temperature <= 0:
            raise ValueError(f'temperature must be positive, not {self.temperature}')

    def arguments(self, steps: int, codes: Index) -> tuple[jax.Array, draw.Draw]:
        """The guidance of each of `steps` steps, and the draw."""
        ramp_S = draw.guidance_ramp(self.guidance, steps)
        if self.smooth:
            return ramp_S, draw.Smooth(steps=steps)
        keep = Filter(top_k=self.top_k, top_p=self.top_p or None, temperature=self.temperature)
        return ramp_S, draw.Plain(keep, codes.draw)


class Pipeline:
    """A model on the default device. Calling it draws one image per prompt."""

    def __init__(self, model: folder.Model, encoder: TextEncoder, dtype: str = 'float32') -> None:
        if encoder.width != model.config.text_width:
            raise UserError(
                f'the text encoder {encoder.source} is {encoder.width} wide, '
                f'but the model was made for {model.config.text_width}: give it its own encoder'
            )
        self.encoder = encoder
        self.network = model.config.build(dtype)
        self.tokenizer = model.tokenizer.config.at(model.config.sides).build()
        self._params = jax.device_put(
            {'model': program.cast(model.params, dtype), 'tokenizer': model.tokenizer.params}
        )
        self._empty = encoder.encode([''])
        self._program = program.compile_program(self.network, self.tokenizer)

    def __call__(
        self,
        prompts: Sequence[str],
        seed: int = 0,
        settings: Settings = Settings(),
        batch: int = 16,
    ) -> np.ndarray:
        """uint8 images [N, H, W, 3]; image i draws from the key of `seed + i`.

        Raises UserError where there is no prompt.
        """
        if not prompts:
            raise UserError('there is no prompt: give at least one')
        return np.concatenate(list(self.stream(prompts, seed, settings, batch)))

    def stream(
        self, prompts: Sequence[str], seed: int, settings: Settings, batch: int
    ) -> Iterator[np.ndarray]:
        """The same images, batch by batch; a short last one is filled up, so one program serves."""
        batch = min(batch, len(prompts))
        drawn = settings.arguments(self.network.schedule.steps, self.tokenizer.codes)
        for first in range(0, len(prompts), batch):
            some = list(prompts[first : first + batch])
            filled = some + [''] * (batch - len(some))
            seeds = range(seed + first, seed + first + batch)
            images = self._program(
                self._params,
                program.image_keys(seeds),
                self.encoder.encode(filled),
                self._empty if settings.guidance else None,
                *drawn,
            )
            yield np.asarray(images)[: len(some)]


def load(place: str | Path = models.SHIPPED, text: str = '', dtype: str = 'float32') -> Pipeline:
    """A pipeline from a model folder, a hub id or 'shipped'.

    `text` names another place of the very same text encoder. Raises UserError for a folder that
    cannot be read and for an encoder that is not the one that the model was trained with.
    """
    model = models.read(place)
    if model.text is None:
        raise UserError(f'{place}: this model has no text encoder and cannot draw from prompts')
    return Pipeline(model, load_text(text or model.text.source, sha256=model.text.sha256), dtype)
