"""Prompts in, images out: what does a user hold?"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from star_jax.checkpoint import folder, models
from star_jax.core.settings import Settings
from star_jax.errors import UserError
from star_jax.sampling import draw, program
from star_jax.text import TextEncoder
from star_jax.text import load as load_text


class Pipeline:
    """A model on the default device. Calling it draws one image per prompt."""

    def __init__(self, model: folder.Model, encoder: TextEncoder, dtype: str = 'float32') -> None:
        if encoder.width != model.config.text_width:
            raise UserError(
                f'the text encoder {encoder.source} is {encoder.width} wide, '
                f'but the model was made for {model.config.text_width}: give it its own encoder'
            )
        self.encoder = encoder
        self.recommended = model.sampling
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
        settings: Settings | None = None,
        batch: int = 16,
    ) -> np.ndarray:
        """uint8 images [N, H, W, 3]; image i draws from the key of `seed + i`.

        `settings` are by default those that the model's maker recommends. Raises UserError where
        there is no prompt.
        """
        if not prompts:
            raise UserError('there is no prompt: give at least one')
        return np.concatenate(list(self.stream(prompts, seed, settings or self.recommended, batch)))

    def stream(
        self, prompts: Sequence[str], seed: int, settings: Settings, batch: int
    ) -> Iterator[np.ndarray]:
        """The same images, batch by batch; a short last one is filled up, so one program serves."""
        batch = min(batch, len(prompts))
        drawn = draw.arguments(settings, self.network.schedule.steps, self.tokenizer.codes)
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
