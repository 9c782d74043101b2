"""What is judged, on which images, and what does it make of them?"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from star_jax.checkpoint import models
from star_jax.core.condition import TextCondition
from star_jax.core.settings import Settings
from star_jax.errors import UserError
from star_jax.evaluation.groups import SHAPES, Group, groups
from star_jax.parallel import machine
from star_jax.protocols import CrossAttentionMode
from star_jax.sampling import loading
from star_jax.sampling.pipeline import Pipeline
from star_jax.text.encoder import TextEncoder

# (bits of work, how many, what is done) -> the same bits, while somebody shows how far it is.
Track = Callable[[Iterable, int, str], Iterable]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What is scored, and how.

    `place`: a model or tokenizer folder. `parts`: names of `report.PARTS` (none: all that place and
    data allow). `count`: images per split and, of shapes, per number of objects. Image i of a group
    is drawn from the key of `seed` + i, once with each of `settings`. `cross_attention`: as of
    `loading.load`.
    """

    place: str
    data: str = SHAPES
    splits: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    count: int = 250
    seed: int = 0
    batch: int = 16
    settings: tuple[Settings, ...] = (Settings(),)
    text: str = ''
    dtype: str = 'float32'
    cross_attention: CrossAttentionMode = 'as_trained'

    def __post_init__(self) -> None:
        if min(self.count, self.batch) < 1:
            raise ValueError(
                f'count and batch must be at least 1, not {self.count} and {self.batch}'
            )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f'seed must lie in [0, 2^32), not {self.seed}')


class Subject:
    """A tokenizer, perhaps with its model (else None), and groups of images to try it on."""

    def __init__(self, job: Job, track: Track) -> None:
        self.job = job
        alone = models.has_only_tokenizer(job.place)
        self.model = (
            None
            if alone
            else loading.with_cross_attention(models.read(job.place), job.cross_attention)
        )
        if self.model and not self.model.config.text_width:
            raise UserError(
                f'{job.place} draws classes, and captions are what is scored: expected a model of '
                'text; `star-jax sample --class` shows what it draws'
            )
        tokenizer = models.read_tokenizer(job.place) if alone else self.model.tokenizer
        schedule = (tokenizer if alone else self.model).config.schedule
        self.tokenizer = dataclasses.replace(tokenizer, config=tokenizer.config.at(schedule))
        self.resolution = self.tokenizer.config.resolution
        self.groups = groups(job.data, job.splits, job.count, self.resolution)
        count = sum(len(group.source) for group in self.groups)
        machine.check_memory(f'{count:,} pictures', count * 3 * math.prod(self.resolution))
        self._track = track

    @functools.cached_property
    def pipe(self) -> Pipeline:
        """Raises UserError where there is no model that draws."""
        job = self.job
        pipe = loading.prepare(self.model, job.place, text=job.text, dtype=job.dtype)
        pipe.encoder = _Remembering(pipe.encoder)
        return pipe

    def draw(self, group: Group, settings: Settings) -> np.ndarray:
        """uint8 [N, H, W, 3], from the group's captions."""
        seeds = range(self.job.seed, self.job.seed + len(group.captions))
        bits = self.pipe.stream(group.captions, seeds, settings, self.job.batch)
        return np.concatenate(list(self.shown(bits, group, 'drawing')))

    def shown(self, bits: Iterable, group: Group, verb: str) -> Iterable:
        """The same bits, one for each batch of a group, while their progress is shown."""
        count = -(-len(group.source) // self.job.batch)
        return self._track(bits, count, f'{verb} {group.name}')

    def by_split(self, found: Sequence[Any]) -> dict[str, list[Any]]:
        """What was found of each group, in one list for each split."""
        collected = collections.defaultdict(list)
        for group, one in zip(self.groups, found, strict=True):
            collected[group.split].append(one)
        return collected


class _Remembering:
    """An encoder that reads the same captions once: a sweep draws them again and again."""

    def __init__(self, encoder: TextEncoder) -> None:
        self._encoder = encoder
        self._known: dict[tuple[str, ...], TextCondition] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._encoder, name)

    def encode(self, captions: Sequence[str]) -> TextCondition:
        key = tuple(captions)
        if key not in self._known:
            self._known[key] = self._encoder.encode(captions)
        return self._known[key]
