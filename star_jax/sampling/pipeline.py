"""Prompts in, images out: what does a user hold?

    pipe = star_jax.load('runs/shapes/model')
    images = pipe(['a red circle'], seed=0, guidance=1.0, top_k=5)  # uint8 [1, H, W, 3]

The same keys draw the same images, however many are drawn together.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from star_jax.checkpoint import folder, models
from star_jax.core.buckets import Buckets, choose
from star_jax.core.classes import Classes
from star_jax.core.settings import Settings, Stable
from star_jax.errors import UserError
from star_jax.parallel import rules
from star_jax.parallel.mesh import MeshShape, batch_shards
from star_jax.sampling import program, stable
from star_jax.text import TextEncoder
from star_jax.text import load as load_text

CrossAttentionMode = Literal['as_trained', 'released', 'corrected']

BATCH = 16  # images per run of the program, unless a caller says otherwise


class Pipeline:
    """A model on the devices of a mesh. Calling it draws one image per prompt.

    One program per number of images and kind of settings is compiled; the last, smaller batch of a
    call is filled up to a power of two, so that there are few of them.
    """

    def __init__(
        self,
        model: folder.Model,
        encoder: TextEncoder | Classes,
        dtype: str = 'float32',
        mesh: Mesh | None = None,
        buckets: Buckets | None = None,
    ) -> None:
        self.encoder = encoder
        self.recommended = model.sampling
        self.mesh = mesh or MeshShape(data=1).build(jax.devices()[:1])
        self.network = model.config.build(dtype).with_sharding(self.mesh)
        self.tokenizer = model.tokenizer.config.at(model.config.schedule).build(dtype)
        platform, sizes = self.mesh.devices.flat[0].platform, self.network.schedule.sizes
        shared = choose(buckets, sizes, platform)
        self._program = program.compile_program(self.network, self.tokenizer, shared)
        where = {
            name: rules.shardings(one.config.abstract(), self.mesh, f' of the {name}')
            for name, one in (('model', model), ('tokenizer', model.tokenizer))
        }
        self._params = jax.device_put(
            program.cast({'model': model.params, 'tokenizer': model.tokenizer.params}, dtype), where
        )
        self._empty = jax.device_put(encoder.encode(['']), rules.replicated(self.mesh))

    def __call__(
        self, prompts: Sequence[str], seed: int = 0, batch: int = BATCH, **settings: Any
    ) -> np.ndarray:
        """uint8 images [N, H, W, 3]; image i draws from the key of `seed + i`.

        `settings` are fields of `Settings`; those left out are what the model's maker recommends.
        `stable=True` means as recommended, or as the originals' demo has it.
        Raises UserError for settings that are none, and where there is no prompt.
        """
        if isinstance(prompts, str):
            raise UserError(f'prompts come as a list, not as one text: give [{prompts[:30]!r}]')
        if not prompts:
            raise UserError('there is no prompt: give at least one')
        if batch < 1:
            raise UserError(f'batch must be at least 1, not {batch}')
        if not 0 <= seed <= program.SEEDS - len(prompts):
            raise UserError(
                f'the seeds of {len(prompts)} images must lie in [0, 2^32), and {seed} is the '
                'first: choose another seed'
            )
        seeds = range(seed, seed + len(prompts))
        return np.concatenate(list(self.stream(prompts, seeds, self.resolve(**settings), batch)))

    def resolve(self, **settings: Any) -> Settings:
        """The recommended settings with some replaced; a UserError for what is no setting."""
        known = [field.name for field in dataclasses.fields(Settings)]
        if unknown := sorted(set(settings) - set(known)):
            raise UserError(
                f'there is no setting {unknown[0]!r} of sampling: choose of {", ".join(known)}'
            )
        if isinstance(settings.get('stable'), bool):
            settings = settings | {'stable': self._stable(settings['stable'])}
        try:
            return dataclasses.replace(self.recommended, **settings)
        except ValueError as error:
            raise UserError(str(error)) from error

    def _stable(self, wanted: bool) -> Stable:
        recommended = self.recommended.stable
        if not wanted:
            return Stable()
        return Stable(version='1024') if recommended == Stable() else recommended

    def stream(
        self, prompts: Sequence[str], seeds: Sequence[int], settings: Settings, batch: int
    ) -> Iterator[np.ndarray]:
        """The images of prompts and seeds, batch by batch, uint8 [b, H, W, 3].

        The next batch is on its way while the caller has one in hand.
        """
        drawn = stable.arguments(settings, self.network, self.tokenizer.codes)
        empty = self._empty if settings.guidance else None
        waiting, first = None, 0
        for rows in batches(len(prompts), batch, batch_shards(self.mesh)):
            some = slice(first, first + rows)
            first += rows
            real = len(prompts[some])
            filled = [*prompts[some], *[''] * (rows - real)]
            keys_B = program.image_keys([*seeds[some], *[0] * (rows - real)])
            given = jax.device_put(
                (keys_B, self.encoder.encode(filled)), rules.batch_sharding(self.mesh)
            )
            images = self._program(self._params, *given, empty, *drawn)
            if waiting:
                yield _fetched(*waiting)
            waiting = images, real
        if waiting:
            yield _fetched(*waiting)


def batches(count: int, most: int, ways: int) -> list[int]:
    """How many images each run of the program draws: `most`, and for the rest 1, 2, 4, ...

    All of them times what it takes to divide by `ways` (of which `most` holds at least one).

    >>> batches(37, 16, 1)
    [16, 16, 8]
    """
    most = -(-most // ways) * ways
    full, rest = divmod(count, most)
    if not rest:
        return [most] * full
    last = ways
    while last < rest:
        last *= 2
    return [most] * full + [min(last, most)]


def load(
    place: str | Path,
    text: str = '',
    dtype: str = 'float32',
    mesh: Mesh | None = None,
    cross_attention: CrossAttentionMode = 'as_trained',
    buckets: Buckets | None = None,
) -> Pipeline:
    """A pipeline from a model folder, a hub id, or 'shipped'.

    The text encoder is the one that the model names, wherever `text` says it lies. `dtype` is that
    of the activations. Parameters are placed on `mesh` (by default the first device alone) by the
    rules of training, and batches split over it. The `cross_attention` is the model's
    own, 'corrected', or 'released', where an image's unprompted row sees what its prompted one
    does. `buckets` are the first and the last of scales that share a part of the program (by
    default those that suit the platform): images are the same, compiling takes less and drawing
    more. Raises UserErrors for folders that cannot be read, for an encoder that is not the one that
    the model was trained with and for buckets beyond its scales.
    """
    read = with_cross_attention(models.read(place), cross_attention)
    return prepare(read, str(place), text, dtype, mesh, buckets)


def prepare(
    model: folder.Model,
    place: str,
    text: str = '',
    dtype: str = 'float32',
    mesh: Mesh | None = None,
    buckets: Buckets | None = None,
) -> Pipeline:
    """A pipeline of a model that was read from `place`; all else as in `load`."""

    def load_encoder() -> TextEncoder:
        if model.text:
            named = text or model.text.source
            return load_text(named, sha256=model.text.sha256, mesh=mesh)
        if not text:
            raise UserError(
                f'{place}: the model names no text encoder, and it draws from prompts: name the '
                'one that it was trained with (--text FOLDER)'
            )
        return load_text(text, mesh=mesh)

    return Pipeline(model, model.config.prompt_encoder(load_encoder), dtype, mesh, buckets)


def with_cross_attention(model: folder.Model, cross_attention: CrossAttentionMode) -> folder.Model:
    """The model with the cross-attention asked for; a UserError where it has none."""
    if cross_attention == 'as_trained':
        return model
    try:
        config = model.config.with_cross_attention(released=cross_attention == 'released')
    except ValueError as error:
        raise UserError(str(error)) from error
    return dataclasses.replace(model, config=config)


def _fetched(images: jax.Array, real: int) -> np.ndarray:
    return np.asarray(images)[:real]
