"""Where are encoded images and text features of a run stored, and what must have made them?

    data/         the encoded training images (`star_jax.data.encoded`)
    validation/   the encoded images of the validation set
    text/         the features of all captions (`star_jax.text.cache`)

Where images are sorted into templates, those of each are in a folder named after its last grid,
such as 3x4/data and 3x4/validation.

A folder serves every run with the same tokenizer, scales, text encoder and sets, whatever it trains
on them. It may be moved together with its sets, except for a folder of images: its files are
compared by the times of their last change.
"""

import dataclasses
import hashlib
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
from rich.progress import Progress

from star_jax import files
from star_jax.checkpoint import config, weights
from star_jax.checkpoint.folder import StoredTokenizer
from star_jax.console import progress_bar
from star_jax.data import encoded, pipeline
from star_jax.data.caption_choice import CaptionChoice
from star_jax.data.crops import WHOLE_IMAGES, Crops
from star_jax.data.pipeline import Source
from star_jax.errors import UserError
from star_jax.protocols import PromptEncoder
from star_jax.text.cache import FeatureCache, segment_paths
from star_jax.training.run import Data, Run

SETS = ('data', 'validation')  # fields of a run
FEATURES = np.dtype(np.float16)  # fewer labels differ than in bfloat16 (docs/training.md)
ENCODING = 'encoding'  # part of a key; absent where the encoded images are codes
DIGITS = 16  # length of a digest in a key, which needs to be readable, not secure

Sources = Mapping[str, Source]
Encode = Callable[[np.ndarray], jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
    """The networks and settings that make the encoded images and text features of a run.

    Attributes:
        run: the config.
        tokenizer: encodes the images.
        prompt_encoder: encodes the captions.
        features: encoded images are features instead of codes.
    """

    run: Run
    tokenizer: StoredTokenizer
    prompt_encoder: PromptEncoder
    features: bool = False

    def key(self, name: str, source: Source) -> encoded.Key:
        """Everything that the encoded images of the set `name` depend on."""
        encoding = {ENCODING: f'features in {FEATURES}'} if self.features else {}
        return (
            encoding
            | self._crops(name).encoding
            | {
                'tokenizer': _digest(self.tokenizer),
                'grids': list(map(list, self.run.model.schedule.grids)),
                'text': self.prompt_encoder.identity[:DIGITS],
                name: _settings(getattr(self.run, name)),
                'images': source.fingerprint()[:DIGITS],
                'examples': len(source),
            }
        )

    def read(self, folder: Path, sources: Sources, example: encoded.ArraySpec) -> Sources:
        """The sources, with encoded images like `example`; UserErrors as for `encoded.read`."""

        def read(name: str, source: Source) -> Source:
            shape = self._crops(name).stored_shape(example.shape)
            stored = jax.ShapeDtypeStruct(shape, example.dtype)
            return encoded.read(folder / name, self.key(name, source), source, stored)

        return {name: read(name, source) for name, source in sources.items()}

    def write(self, folder: Path, sources: Sources, encode: Encode) -> None:
        """Fills a folder with encoded images; valid entries that it already holds stay.

        Args:
            folder: the cache.
            sources: the sets, by name.
            encode: encodes exactly `run.batch` uint8 images.

        Raises:
            UserError: as for `encoded.write`.
        """

        def stored(images: np.ndarray) -> np.ndarray:
            images = np.asarray(encode(images))
            return images.astype(FEATURES) if self.features else images

        size = self.tokenizer.config.at(self.run.model.schedule).resolution
        for name, source in sources.items():
            with progress_bar() as bar:
                encode_all = self._crops(name).encode_all(stored, size)
                blocks = _Blocks(source, encode_all, self.run.batch, bar, f'encoding {name}')
                encoded.write(folder / name, self.key(name, source), len(source), blocks)

    def _crops(self, name: str) -> Crops:
        """The crops of the set `name`: only training images are cropped."""
        return self.run.crops if name == 'data' else WHOLE_IMAGES

    def write_texts(self, folder: Path, sources: Sources) -> None:
        """Fills a folder with the text features of the sets, if the run keeps them."""
        if keeps_features(self.run, self.prompt_encoder):
            texts = FeatureCache(self.prompt_encoder, folder)
            texts.warm(
                all_texts(sources.values(), self.run.captions),
                other=FeatureCache(self.prompt_encoder),
            )


def holds_features(folder: Path) -> bool | None:
    """Whether the encoded images in a cache are features; None if there is none."""
    paths = [path / encoded.KEY for path in _folders(folder) if (path / encoded.KEY).exists()]
    return ENCODING in config.read_json(paths[0]) if paths else None


def keeps_features(run: Run, prompt_encoder: PromptEncoder) -> bool:
    """Whether encoded prompts are cached on disk; never if encoding them computes nothing."""
    return run.text_features == 'cached' and bool(prompt_encoder.params)


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """The encoded images of a source from any example on, a batch at a time."""

    source: Source
    encode: Encode
    batch: int
    bar: Progress
    title: str

    def __call__(self, first: int) -> Iterator[np.ndarray]:
        start, done = time.monotonic(), first
        task = self.bar.add_task(self.title, total=len(self.source), completed=first, note='')
        for batch in pipeline.sequential(self.source, self.batch, first=first):
            padded, real = pipeline.pad(batch, self.batch)
            yield np.asarray(self.encode(padded['image']))[:real]
            done += real
            rate = f'{(done - first) / (time.monotonic() - start):.0f} images/s'
            self.bar.update(task, completed=done, note=rate)


def cache_path(run: Run) -> Path:
    """The folder of a run's cache: the one that it names, or one beside its folder of images.

    The embedded set has no folder: its caches are in the user's cache folder.
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
    return files.cache_folder() / 'codes' / f'{type(run.data).__name__.lower()}-{named[:DIGITS]}'


def check_free(folder: Path) -> None:
    """Raises UserError if no cache can be written to a folder."""
    files.check_folder(folder)
    for name in SETS:
        encoded.check_free(folder / name)


def check(folder: Path, remove: bool = False) -> encoded.CheckResult:
    """Reads every file of a cache and compares its digest.

    Args:
        folder: the cache.
        remove: remove damaged files, which `data cache` then makes again.

    Raises:
        UserError: the folder holds no cache.
    """
    paths = [path for sets in _folders(folder) for path in encoded.shard_paths(sets)]
    paths += segment_paths(folder)
    if not paths:
        raise UserError(
            f'{folder} holds no encoded images or features: expected a folder that '
            '`star-jax data cache CONFIG` has made'
        )
    found = encoded.check(paths)
    if remove:
        for path in found.damaged:
            path.unlink()
    return found


def _folders(cache: Path) -> list[Path]:
    """The folders of encoded images in a cache."""
    found = [[cache / name, *sorted(cache.glob(f'[0-9]*x[0-9]*/{name}'))] for name in SETS]
    return list(itertools.chain.from_iterable(found))


def _digest(tokenizer: StoredTokenizer) -> str:
    """The digest of a tokenizer's weights and config, except for its scales."""
    sizes = {k: v for k, v in config.to_json(tokenizer.config).items() if k != 'grids'}
    digest = hashlib.sha256(repr(sizes).encode())
    for name, array in weights.flatten(tokenizer.params).items():
        array = np.ascontiguousarray(array)
        digest.update(f'{name} {array.dtype} {array.shape}'.encode() + array.tobytes())
    return digest.hexdigest()[:DIGITS]


def _settings(data: Data) -> dict:
    """The settings of a set that its encoded images depend on.

    The path is left out: the set may be moved, and its files are compared. Ratios decide which
    images a template has, which are counted and compared.
    """
    settings = {'set': type(data).__name__, **config.to_json(data)}
    return {name: value for name, value in settings.items() if name not in ('path', 'aspects')}


def all_texts(sources: Iterable[Source], choice: CaptionChoice) -> list[str]:
    """All texts that may become captions: the choices of training, and first captions."""
    texts = []
    for source in sources:
        for captions in map(source.captions, range(len(source))):
            texts += choice.texts(captions)
            texts.append(captions[0])
    return texts
