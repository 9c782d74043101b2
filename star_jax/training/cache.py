"""Where do cached codes and text features of a run's sets lie, and what must have made them?

    data/         the codes of the training pictures (`star_jax.data.codes`)
    validation/   those of the held-out ones
    text/         the features of all captions (`star_jax.text.cache`)

A folder serves every run with the same tokenizer, scales, text encoder and sets, whatever it
trains on them. It may be moved with its sets, but for a folder of images, whose files are known by
the times of their last change.
"""

import dataclasses
import hashlib
import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from star_jax import files
from star_jax.checkpoint import config, weights
from star_jax.checkpoint.folder import StoredTokenizer
from star_jax.core.classes import Classes
from star_jax.data import codes, pipeline
from star_jax.data.pipeline import Source
from star_jax.parallel import startup
from star_jax.text import FeatureCache, TextEncoder
from star_jax.training.run import Data, Run

SETS = ('data', 'validation')  # of a run
DIGITS = 16  # of a digest in a key: nobody forges them, and a message can show them

Sources = Mapping[str, Source]
Encode = Callable[[np.ndarray], jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
    """What makes the codes and text features of a run."""

    run: Run
    tokenizer: StoredTokenizer
    encoder: TextEncoder | Classes

    def key(self, name: str, source: Source) -> codes.Key:
        """All that the codes of the set `name` ('data' or 'validation') depend on."""
        return {
            'tokenizer': _digest(self.tokenizer),
            'grids': list(map(list, self.run.model.schedule.grids)),
            'text': self.encoder.identity[:DIGITS],
            name: _settings(getattr(self.run, name)),
            'pictures': source.fingerprint()[:DIGITS],
            'examples': len(source),
        }

    def read(self, folder: Path, sources: Sources) -> Sources:
        """The sources with codes in place of images; UserErrors as of `codes.read`."""
        return {
            name: codes.read(folder / name, self.key(name, source), source)
            for name, source in sources.items()
        }

    def write(self, folder: Path, sources: Sources, encode: Encode) -> None:
        """Fills a folder; what is there already and still true stays.

        `encode` makes codes of exactly `run.batch` pictures. UserErrors as of `codes.write`.
        """
        for name, source in sources.items():
            with _bar() as bar:
                blocks = _Blocks(source, encode, self.run.batch, bar, f'encoding {name}')
                codes.write(folder / name, self.key(name, source), len(source), blocks)
        if keeps_features(self.run, self.encoder):
            texts = FeatureCache(self.encoder, folder)
            texts.warm(_captions(sources), other=FeatureCache(self.encoder))


def keeps_features(run: Run, encoder: TextEncoder | Classes) -> bool:
    """Whether what an encoder makes of prompts is kept on disk: not where it computes nothing."""
    return run.features == 'cached' and bool(encoder.params)


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """The codes of a source from any example on, a batch at a time."""

    source: Source
    encode: Encode
    batch: int
    bar: Progress
    title: str

    def __call__(self, first: int) -> Iterator[np.ndarray]:
        start, done = time.monotonic(), first
        task = self.bar.add_task(self.title, total=len(self.source), completed=first, rate='')
        for batch in pipeline.sequential(self.source, self.batch, first=first):
            padded, real = pipeline.pad(batch, self.batch)
            yield np.asarray(self.encode(padded['image']))[:real]
            done += real
            rate = f'{(done - first) / (time.monotonic() - start):.0f} images/s'
            self.bar.update(task, completed=done, rate=rate)


def place(run: Run) -> Path:
    """Where the cache of a run belongs: where it says, else beside the set of a folder.

    The embedded set has no folder; its caches lie in the user's cache folder.
    """
    if run.cache:
        return Path(run.cache)
    path = Path(os.path.expanduser(getattr(run.data, 'path', '')))
    if path.name and path.is_dir():
        return path.with_name(f'{path.name}.codes')
    settings = [config.to_json(part) for part in (run.data, run.validation)]
    named = hashlib.sha256(
        repr((settings, run.tokenizer, run.model.schedule.grids)).encode()
    ).hexdigest()
    return startup.cache_folder() / 'codes' / f'{type(run.data).__name__.lower()}-{named[:DIGITS]}'


def check_free(folder: Path) -> None:
    """Raises UserError where no cache can be written in a folder."""
    files.check_folder(folder)
    for name in SETS:
        codes.check_free(folder / name)


def _digest(tokenizer: StoredTokenizer) -> str:
    """Of a tokenizer's weights and config, but for its scales: one serves several."""
    sizes = {k: v for k, v in config.to_json(tokenizer.config).items() if k != 'grids'}
    digest = hashlib.sha256(repr(sizes).encode())
    for name, array in weights.flatten(tokenizer.params).items():
        array = np.ascontiguousarray(array)
        digest.update(f'{name} {array.dtype} {array.shape}'.encode() + array.tobytes())
    return digest.hexdigest()[:DIGITS]


def _settings(data: Data) -> dict:
    """Those of a set but for its place: it may be moved, and its files are looked at."""
    settings = {'set': type(data).__name__, **config.to_json(data)}
    return {name: value for name, value in settings.items() if name != 'path'}


def _captions(sources: Sources) -> list[str]:
    """All captions of all sets."""
    found = (map(source.captions, range(len(source))) for source in sources.values())
    return list(itertools.chain.from_iterable(itertools.chain.from_iterable(found)))


def _bar() -> Progress:
    columns = (
        TextColumn('{task.description}'),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn('{task.fields[rate]}'),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True))
