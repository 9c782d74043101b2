"""Prompts in, images out: which object does a user hold?

    pipe = star_jax.load('runs/shapes/model')
    images = pipe(['a red circle'], seed=0, guidance=1.0, top_k=5)  # uint8 [1, H, W, 3]

Equal seeds give equal images, however many are sampled together; in bfloat16, where the rounding
of a product depends on the number of its rows, only with `exact=True`.

A pipeline encodes the prompts and runs a `program`; its loop over the steps is in `sampler`, and
`trunks` runs the layers of one step.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from star_jax.checkpoint import folder
from star_jax.core import condition
from star_jax.core.argument_types import choice, flag, instance, show, text, whole_number
from star_jax.core.buckets import Buckets, choose
from star_jax.core.settings import Dtype, Settings, StableSettings
from star_jax.errors import UserError, UserTypeError
from star_jax.nn.attention_dispatch import named
from star_jax.parallel import machine, rules
from star_jax.parallel.mesh import MeshShape, batch_shards
from star_jax.protocols import PromptEncoder
from star_jax.sampling import given_images, program, weight_layout
from star_jax.sampling.given_images import AnyImage

BATCH = 16  # images per run of the program by default


class Pipeline:
    """A model on the devices of a mesh; calling it samples one image per prompt.

    One program is compiled per number of images, padded length of the texts and kind of settings.
    The last, smaller batch of a call is filled up to a power of two, so that few programs are
    compiled; with `exact` it is filled up to a full batch, so that one program samples every image.

    Attributes:
        encoder: encodes prompts.
        recommended: the settings that the model's maker recommends.
        mesh: the devices.
        network: the transformer.
        tokenizer: its tokenizer.
        template: name of the template of its images, '' if none was chosen.
        size: (height, width) of its images in pixels.
    """

    def __init__(
        self,
        model: folder.StoredModel,
        encoder: PromptEncoder,
        dtype: str = 'float32',
        mesh: Mesh | None = None,
        buckets: Buckets | None = None,
        template: str = '',
        resize: int = 0,
    ) -> None:
        instance('model', model, folder.StoredModel, 'a StoredModel; star_jax.load reads a folder')
        self._dtype = choice('dtype', dtype, Dtype)
        self.encoder = encoder
        self.recommended = model.sampling
        self.template = template
        self.mesh = mesh or MeshShape(data=1).build(jax.devices()[:1])
        platform = self.mesh.devices.flat[0].platform
        attend = named('automatic', platform)
        self.network = model.config.build(dtype, attend=attend).with_sharding(self.mesh)
        self.tokenizer = model.tokenizer.config.at(model.config.schedule).build(dtype)
        self.size = self.tokenizer.resolution
        if resize:
            self.size = _resized(self.size, resize)
            self.tokenizer = self.tokenizer.clone(shown=self.size)
        shared = choose(buckets, self.network.schedule.sizes, platform)
        self._config = model.config
        self._count = sum(leaf.size for leaf in jax.tree.leaves(model.params))
        self._program = program.compile_program(self.network, self.tokenizer, shared)
        self._encode = given_images.encoder(self.tokenizer)
        abstract = {
            name: rules.abstract(part.config.abstract(), self.mesh, f' of the {name}')
            for name, part in (('model', model), ('tokenizer', model.tokenizer))
        }
        params = {'model': model.params, 'tokenizer': model.tokenizer.params}
        params, abstract = (
            weight_layout.arrange(tree, self.network.schedule, platform)
            for tree in (program.cast(params, dtype), abstract)
        )
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        params = jax.device_put(params, shardings)
        self._params = weight_layout.with_switched_kernels(params)
        self._empty = jax.device_put(encoder.encode(['']), rules.replicated(self.mesh))

    def __repr__(self) -> str:
        """The model, its image size and its devices."""
        prompts = {'caption': 'text', 'label': 'classes'}[self.encoder.field]
        height, width = self.size
        devices = self.mesh.devices
        return (
            f'<Pipeline: {type(self._config).__name__} of '
            f'{self._count:,} parameters, from {prompts} to '
            f'images of {height} x {width} px, {self._dtype}, on {devices.size} x '
            f'{devices.flat[0].device_kind}>'
        )

    def __call__(
        self,
        prompts: Sequence[str],
        seed: int | Sequence[int] = 0,
        batch: int = BATCH,
        exact: bool = False,
        image: AnyImage | Sequence[AnyImage] | None = None,
        keep: int = 0,
        **settings: Any,
    ) -> np.ndarray:
        """Samples one image per prompt.

        Args:
            prompts: the prompts, a list of N.
            seed: image i uses the key of `seed + i`; or a list of seeds, one per image.
            batch: images per run of the program.
            exact: fill up every batch, so that an image alone and in a batch is the same image in
                bfloat16, too. It then depends on `batch`.
            image: an image to start from, uint8 (h, w, 3) or of Pillow, or a list of one per
                prompt. Of another size, its centre is cropped and resized by Lanczos.
            keep: how many of its first scales are kept, the finer ones are sampled; of a raster,
                its first rows of tokens.
            **settings: fields of `Settings`; those left out are as recommended. `stable=True`
                means as recommended, or as in the originals' demo.

        Returns:
            uint8 images [N, H, W, 3].

        Raises:
            UserError: an invalid argument, or no prompt; a UserTypeError for a wrong type.
        """
        prompts = _texts(prompts)
        if not prompts:
            raise UserError('there is no prompt: give at least one')
        seeds = _seeds(seed, len(prompts))
        images = self.stream(
            prompts,
            seeds,
            self.resolve(**settings),
            batch=batch,
            exact=exact,
            image=image,
            keep=keep,
        )
        return np.concatenate(list(images))

    def resolve(self, **settings: Any) -> Settings:
        """The recommended settings with some replaced; UserErrors as of a call."""
        known = [field.name for field in dataclasses.fields(Settings)]
        if unknown := sorted(set(settings) - set(known)):
            raise UserError(
                f'there is no setting {unknown[0]!r} of sampling: choose of {", ".join(known)}'
            )
        if isinstance(settings.get('stable'), bool):
            settings = settings | {'stable': self._stable(settings['stable'])}
        lists = {
            name: tuple(value)
            for name, value in settings.items()
            if isinstance(value, list) and isinstance(getattr(self.recommended, name), tuple)
        }
        resolved = dataclasses.replace(self.recommended, **settings | lists)
        program.step_settings(self._config, resolved)  # refuses numbers for other steps
        program.check_negative(self._config, resolved, self.recommended)
        return resolved

    def _stable(self, on: bool) -> StableSettings:
        recommended = self.recommended.stable
        if not on:
            return StableSettings()
        return StableSettings(version='1024') if recommended == StableSettings() else recommended

    def stream(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: Settings,
        *,
        batch: int,
        exact: bool = False,
        image: AnyImage | Sequence[AnyImage] | None = None,
        keep: int = 0,
    ) -> Iterator[np.ndarray]:
        """The images of prompts and seeds, batch by batch, uint8 [b, H, W, 3].

        The next batch is computed while the caller handles the one before.

        Args:
            prompts: the prompts, a list of N.
            seeds: one seed per image.
            settings: how images are sampled.
            batch: images per run of the program.
            exact: as for a call.
            image: as for a call.
            keep: as for a call.

        Raises:
            UserError: as for a call.
        """
        prompts = _texts(prompts)
        seeds = _seeds(seeds, len(prompts))
        instance('settings', settings, Settings, 'a Settings, such as pipe.resolve(top_k=5)')
        if whole_number('batch', batch) < 1:
            raise UserError(f'batch must be at least 1, not {batch}')
        sizes = batches(len(prompts), int(batch), batch_shards(self.mesh), flag('exact', exact))
        most, schedule = max(sizes, default=0), self._config.schedule
        resolution = self.tokenizer.resolution
        pixels = max(math.prod(resolution), math.prod(self.size))
        rows = self.network.width * schedule.sizes[-1] + 3 * pixels
        machine.check_memory(f'a batch of {most:,} images', 4 * most * rows)
        images = given_images.prepare(image, keep, len(prompts), schedule, resolution)
        return self._stream(
            prompts, seeds, settings, sizes=sizes, exact=exact, images=images, keep=keep
        )

    def _stream(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: Settings,
        *,
        sizes: Sequence[int],
        exact: bool,
        images: Sequence[np.ndarray],
        keep: int,
    ) -> Iterator[np.ndarray]:
        pending, first, negative, given = None, 0, None, None
        params, schedule = self._params['tokenizer'], self._config.schedule
        codes = [np.asarray(self._encode(params, image[None])) for image in images]
        if settings.negative:
            encoded = condition.trimmed(self.encoder.encode([settings.negative]))
            negative = jax.device_put(encoded, rules.replicated(self.mesh))
        for size in sizes:
            part = slice(first, first + size)
            first += size
            real = len(prompts[part])
            encoded = self.encoder.encode([*prompts[part], *[''] * (size - real)])
            prompted = encoded if exact else condition.trimmed(encoded)
            keys_B = program.image_keys([*seeds[part], *[0] * (size - real)])
            keys_B, prompted = jax.device_put((keys_B, prompted), rules.batch_sharding(self.mesh))
            if codes:
                of_batch = codes[part] if len(codes) > 1 else codes
                given = given_images.given_codes(of_batch, size, keep, schedule)
                split = rules.batch_sharding(self.mesh)
                given = given.replace(codes=jax.device_put(given.codes, split))
            inputs = program.inputs(
                self._config,
                settings,
                keys_B=keys_B,
                prompted=prompted,
                empty=self._empty,
                negative=negative,
                given=given,
            )
            sampled = self._program(self._params, inputs)
            if pending:
                yield _fetch(*pending)
            pending = sampled, real
        if pending:
            yield _fetch(*pending)


def batches(count: int, most: int, ways: int, exact: bool = False) -> list[int]:
    """The number of images of each run of the program, for `count` images in all.

    Full batches are of `most` images, the last of 1, 2, 4, ... Both are rounded up to multiples of
    `ways`, over which a batch is split. With `exact`, all batches are full.

    >>> batches(37, 16, 1)
    [16, 16, 8]
    """
    most = -(-most // ways) * ways
    if exact:
        return [most] * -(-count // most)
    full, rest = divmod(count, most)
    if not rest:
        return [most] * full
    last = ways
    while last < rest:
        last *= 2
    return [most] * full + [min(last, most)]


def _resized(size: tuple[int, int], side: int) -> tuple[int, int]:
    """The size of square images after they are resized. Raises UserError for others."""
    height, width = size
    if height != width:
        raise UserError(f'resize is for square images, not for {height} x {width} px: leave it out')
    return side, side


def _texts(prompts: object) -> list[str]:
    """The prompts as a list; a UserError unless these are texts that a tokenizer can read."""
    if isinstance(prompts, str):
        raise UserTypeError(f'prompts come as a list, not as one text: give [{prompts[:30]!r}]')
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes | bytearray):
        raise UserTypeError(f'prompts come as a list of texts, not as {show(prompts)}: give a list')
    for number, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise UserTypeError(f'prompt {number} is {show(prompt)}, expected a text')
        text(f'prompt {number}', prompt)
    return list(prompts)


def _seeds(seed: object, count: int) -> Sequence[int]:
    """One seed per image, of a first seed or a list; UserErrors as of a call."""
    if isinstance(seed, np.ndarray) and seed.ndim == 1:
        seed = seed.tolist()
    if isinstance(seed, str | bytes | bytearray | memoryview) or not isinstance(seed, Sequence):
        first = whole_number('seed', seed, ', or a list of one per prompt')
        seeds = range(first, first + count)
    else:
        seeds = [whole_number(f'seed {number}', value) for number, value in enumerate(seed)]
    if len(seeds) != count:
        raise UserError(
            f'there are {len(seeds)} seeds for {count} prompts: give one seed per prompt, or the '
            'first one as a number'
        )
    if invalid := [value for value in seeds if not 0 <= value < program.SEEDS]:
        raise UserError(
            f'the seeds of {count} images must lie in [0, 2^32), and {invalid[0]} does not: choose '
            'another seed'
        )
    return seeds


def _fetch(images: jax.Array, real: int) -> np.ndarray:
    """The first `real` images, on the host."""
    return np.asarray(images)[:real]
