"""What is evaluated, on which images, and with which sampler?"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import numpy as np

from star_jax.checkpoint import models
from star_jax.checkpoint.folder import StoredModel
from star_jax.core.argument_types import check_types
from star_jax.core.condition import TextCondition
from star_jax.core.settings import Settings
from star_jax.errors import UserError
from star_jax.evaluation.groups import SHAPES_DATASET, EvalGroup, load_groups
from star_jax.parallel import machine
from star_jax.protocols import CrossAttentionMode
from star_jax.sampling import loading
from star_jax.sampling.pipeline import Pipeline
from star_jax.text.encoder import TextEncoder

# (items, number of items, description) -> the items, with a progress bar.
TrackProgress = Callable[[Iterable, int, str], Iterable]
Result = TypeVar('Result')


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """The settings of an evaluation.

    Attributes:
        model: a model or tokenizer folder, a hub id, 'shipped' or 'shipped/infinity'.
        data: 'shapes', the folder of a prepared dataset, or a folder of images with captions.
        splits: splits of the data (none: test if there is one, else all that are not for training).
        metrics: names of `eval_report.METRICS` (none: all that the model and the data allow).
        count: images per split, and for shapes per number of objects.
        seed: image i of a group is sampled with the key of `seed` + i; also the seed of intervals.
        batch: images per batch.
        settings: sampling settings; every group is sampled once with each of them.
        text: path or hub id of the text encoder ('': the one that the model folder names).
        dtype: dtype of the activations.
        text_dtype: dtype of the weights and activations of the text encoder.
        cross_attention: as for `loading.load`.
    """

    model: str
    data: str = SHAPES_DATASET
    splits: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    count: int = 250
    seed: int = 0
    batch: int = 16
    settings: tuple[Settings, ...] = (Settings(),)
    text: str = ''
    dtype: str = 'float32'
    text_dtype: str = 'float32'
    cross_attention: CrossAttentionMode = 'as_trained'

    def __post_init__(self) -> None:
        check_types(self)
        if min(self.count, self.batch) < 1:
            raise UserError(
                f'count and batch must be at least 1, not {self.count} and {self.batch}'
            )
        if not 0 <= self.seed < 2**32:
            raise UserError(f'seed must lie in [0, 2^32), not {self.seed}')


class EvalContext:
    """The loaded tokenizer and model, and the groups of images to evaluate them on.

    `check` is whether weights are compared with the SHA-256 that the model folder keeps.

    Attributes:
        options: the settings of the evaluation.
        model: the stored model, or None if the folder holds only a tokenizer.
        tokenizer: the stored tokenizer, at the resolution of the model.
        resolution: height and width of the images in pixels.
        groups: the images, by split and number of objects.

    Raises:
        UserError: a folder or dataset that cannot be read, or a model of classes.
    """

    def __init__(self, options: EvalOptions, track: TrackProgress, check: bool = True) -> None:
        self.options = options
        if models.has_only_tokenizer(options.model):
            self.model, tokenizer = None, models.read_tokenizer(options.model, check)
            schedule = tokenizer.config.schedule
        else:
            self.model = _read_text_model(options, check)
            tokenizer, schedule = self.model.tokenizer, self.model.config.schedule
        self.tokenizer = dataclasses.replace(tokenizer, config=tokenizer.config.at(schedule))
        self.resolution = self.tokenizer.config.resolution
        self.groups = load_groups(options.data, options.splits, options.count, self.resolution)
        count = sum(len(group.source) for group in self.groups)
        machine.check_memory(f'{count:,} images', count * 3 * math.prod(self.resolution))
        self._track = track

    @functools.cached_property
    def pipe(self) -> Pipeline:
        """The sampling pipeline of the model."""
        options = self.options
        dtypes = {'dtype': options.dtype, 'text_dtype': options.text_dtype}
        pipe = loading.prepare(self.model, options.model, text=options.text, **dtypes)
        pipe.encoder = _CachingEncoder(pipe.encoder)
        return pipe

    def sample(self, group: EvalGroup, settings: Settings) -> np.ndarray:
        """uint8 [N, H, W, 3]: one image for the first caption of each image of the group."""
        seeds = range(self.options.seed, self.options.seed + len(group.captions))
        batches = self.pipe.stream(group.captions, seeds, settings, batch=self.options.batch)
        return np.concatenate(list(self.with_progress(batches, group, 'sampling')))

    def with_progress(
        self, batches: Iterable[Result], group: EvalGroup, verb: str
    ) -> Iterable[Result]:
        """The batches of a group, with a progress bar."""
        count = -(-len(group.source) // self.options.batch)
        return self._track(batches, count, f'{verb} {group.name}')

    def by_split(self, results: Sequence[Result]) -> dict[str, list[Result]]:
        """One result per group, collected in one list per split."""
        collected = collections.defaultdict(list)
        for group, result in zip(self.groups, results, strict=True):
            collected[group.split].append(result)
        return collected


def _read_text_model(options: EvalOptions, check: bool) -> StoredModel:
    """The model, with the cross-attention of the options. Raises UserError for one of classes."""
    model = models.read(options.model, check)
    model = loading.with_cross_attention(model, options.cross_attention)
    if not model.config.text_width:
        raise UserError(
            f'{options.model} samples from classes, and evaluation needs captions: expected a '
            'model of text; `star-jax sample --class` samples its classes'
        )
    return model


class _CachingEncoder:
    """A text encoder that encodes equal lists of captions once: a sweep repeats them.

    Between the calls it keeps no padding, which is most of the 512 tokens of a T5 caption.
    """

    def __init__(self, encoder: TextEncoder) -> None:
        self._encoder = encoder
        self._encoded: dict[tuple[str, ...], TextCondition] = {}

    def __getattr__(self, name: str) -> object:
        return getattr(self._encoder, name)

    def encode(self, captions: Sequence[str]) -> TextCondition:
        key = tuple(captions)
        if key in self._encoded:
            return _padded(self._encoded[key], self._encoder.length)
        encoded = self._encoder.encode(captions)
        self._encoded[key] = _without_padding(encoded)
        return encoded


def _without_padding(text: TextCondition) -> TextCondition:
    """A copy without the tokens that are padding of all captions; they are on the right."""
    longest = int(text.mask_BT.sum(1).max(initial=0))
    return text.replace(
        states_BTE=text.states_BTE[:, :longest].copy(), mask_BT=text.mask_BT[:, :longest].copy()
    )


def _padded(text: TextCondition, length: int) -> TextCondition:
    """Captions padded to `length` tokens."""
    tokens = (0, length - text.mask_BT.shape[1])
    return text.replace(
        states_BTE=np.pad(text.states_BTE, ((0, 0), tokens, (0, 0))),
        mask_BT=np.pad(text.mask_BT, ((0, 0), tokens)),
    )
