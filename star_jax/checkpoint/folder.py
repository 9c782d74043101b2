"""What does a model folder contain, and how is it written and read?

    config.json             {family, model, tokenizer, text: {source, sha256}, sampling}
    model.safetensors       parameters of the transformer ('/'-joined names, layers stacked)
    tokenizer.safetensors   parameters of the image tokenizer, which every folder has
    ignored.safetensors     unused tensors of a converted file, for the conversion back
    SHA256SUMS              SHA-256 of every file of weights, compared when they are loaded
    text/                   a copy of the text encoder, unless config.json has another source

A folder without a transformer has the family 'tokenizer' and only the tokenizer's files. The names
of families and tokenizers are those of the registry. Reading a folder executes no Python.
"""

import dataclasses
import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from star_jax import checksums, files
from star_jax.checkpoint import config, structure, weights
from star_jax.core.settings import Settings
from star_jax.errors import UserError
from star_jax.families.registry import FAMILIES, TOKENIZERS, name_of
from star_jax.protocols import Family

CONFIG = 'config.json'
MODEL = 'model.safetensors'
TOKENIZER = 'tokenizer.safetensors'
IGNORED = 'ignored.safetensors'
TEXT = 'text'
TEXT_SOURCE = f'./{TEXT}'  # the source of a text encoder inside the folder
TOKENIZER_ONLY = 'tokenizer'  # the family of a folder without a transformer

MODEL_FILE = re.compile(
    r'config\.json|SHA256SUMS|text|ignored\.safetensors|(model|tokenizer)(-\d+-of-\d+)?\.safetensors(\.index\.json)?'
)
HUB_ID = re.compile(r'\w[\w.-]*/\w[\w.-]*')
HUB_FILES = ['*.json', '*.safetensors', checksums.SUMS, '*.txt', '*.model']  # never pickled weights


Load = Callable[[Path], Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextEncoderReference:
    """The text encoder that a model was trained with.

    Attributes:
        source: a folder, `package:NAME` or hub id.
        sha256: SHA-256 of its files, hexadecimal.
    """

    source: str
    sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredTokenizer:
    """An image tokenizer.

    Attributes:
        config: sizes and parts of the tokenizer; its class decides the kind.
        params: parameters of the tokenizer.
    """

    config: Any
    params: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredModel:
    """Configs and parameters of a transformer and its tokenizer.

    Attributes:
        config: sizes and parts of the transformer; its class decides the family.
        params: parameters of the transformer.
        tokenizer: the image tokenizer.
        text: the text encoder that it was trained with, or None.
        sampling: recommended sampling settings.
    """

    config: Family
    params: Mapping[str, Any]
    tokenizer: StoredTokenizer
    text: TextEncoderReference | None
    sampling: Settings = Settings()


def write(
    folder: str | Path,
    content: StoredModel | StoredTokenizer,
    fill: Callable[[Path], None] | None = None,
    *,
    allow_nonfinite: bool = False,
) -> None:
    """Writes a model folder, atomically.

    An existing model folder is replaced; its files that are no part of a model stay. A text
    encoder in its `text/` stays too, if it is the source of the model's text encoder.

    Args:
        folder: the folder to write.
        content: a model, or a tokenizer only.
        fill: writes further files to the new folder.
        allow_nonfinite: write NaN and infinite weights, too.

    Raises:
        UserError: `folder` exists and is not a model folder, or cannot be written, or weights are
            not finite.
    """
    folder = Path(folder).absolute()
    check_free(folder)
    tokenizer = content.tokenizer if isinstance(content, StoredModel) else content
    content, keeps_text = _with_relative_text(content, folder / TEXT)

    def is_replaced(name: str) -> bool:
        return _is_model_file(name) and not (keeps_text and name == TEXT)

    with files.replacing_folder(folder, is_replaced) as new:
        flaws: list[str] = []
        digests = weights.save(new / TOKENIZER, tokenizer.params, not_finite=flaws)
        if isinstance(content, StoredModel):
            digests |= weights.save(new / MODEL, content.params, not_finite=flaws)
        if flaws and not allow_nonfinite:
            raise not_finite(folder, flaws)
        if fill:
            fill(new)
        if (new / IGNORED).exists():
            digests[IGNORED] = weights.sha256(new / IGNORED)
        checksums.write(new, digests)
        config.write_json(new / CONFIG, _describe(content, tokenizer))


def read(folder: str | Path, load: Load = weights.load) -> StoredModel:
    """Reads the model in a folder.

    Args:
        folder: the model folder.
        load: reads parameters from the path of a file.

    Raises:
        UserError: the folder is missing or damaged, its family is not registered, or it contains
            only a tokenizer.
    """
    folder = Path(folder)
    data = _read_config(folder)
    if data['family'] == TOKENIZER_ONLY:
        raise UserError(f'{folder}: holds only a tokenizer, expected a model')
    cls = _look_up(FAMILIES, data['family'], f'{folder / CONFIG}: family')
    text = data['text'] and config.from_json(
        TextEncoderReference, data['text'], where=f'{folder / CONFIG}, text'
    )
    if text and (text.source == TEXT_SOURCE or text.source.startswith(f'{TEXT_SOURCE}/')):
        text = dataclasses.replace(text, source=str(folder / text.source))
    return StoredModel(
        config=config.from_json(cls, data['model'], where=f'{folder / CONFIG}, model'),
        params=load(folder / MODEL),
        tokenizer=_read_tokenizer(folder, data, load),
        text=text,
        sampling=_read_sampling(folder, data),
    )


def read_tokenizer(folder: str | Path, load: Load = weights.load) -> StoredTokenizer:
    """Reads the tokenizer in any model folder; raises as `read`."""
    folder = Path(folder)
    return _read_tokenizer(folder, _read_config(folder), load)


def has_only_tokenizer(folder: str | Path) -> bool:
    """Whether a model folder has no transformer; raises as `read`."""
    return _read_config(Path(folder))['family'] == TOKENIZER_ONLY


def read_sampling(folder: str | Path) -> Settings:
    """Reads the recommended sampling settings of a model; raises as `read`."""
    folder = Path(folder)
    return _read_sampling(folder, _read_config(folder))


def digest(folder: str | Path) -> str:
    """SHA-256 over config and weights, hexadecimal; raises as `read`."""
    folder = Path(folder)
    _read_config(folder)
    total = hashlib.sha256()
    paths = (path for path in folder.iterdir() if path.is_file())
    for path in sorted(path for path in paths if _is_model_file(path.name)):
        if path.name == checksums.SUMS:  # follows from the others
            continue
        content = checksums.sha256(path)
        total.update(f'{path.name} {content}\n'.encode())
    return total.hexdigest()


def weight_files(folder: Path, parts: Sequence[str]) -> list[str]:
    """The names of the files of weights, sharded or not, with their indices; raises as `read`."""
    names = []
    for part in parts:
        if part == MODEL and has_only_tokenizer(folder):
            continue
        names += [path.name for path in weights.paths(folder / part)]
        if (index := weights.index_path(folder / part)).exists():
            names.append(index.name)
    return names


def not_finite(path: Path, names: Sequence[str]) -> UserError:
    """The UserError for weights that are NaN or infinite."""
    return UserError(
        f'{path}: NaN or infinite weights ({weights.listed(names)}), of which no model makes '
        'images: use another checkpoint or file'
    )


def find(source: str | Path) -> Path:
    """The local folder of a source: a shipped model, a folder, or a hub id `owner/name`.

    Configs and safetensors of a hub id are downloaded to the cache of the hub's client.

    Raises:
        UserError: there is no such folder, and no such hub id.
    """
    if str(source) in files.SHIPPED_MODELS:
        return files.shipped_folder(str(source))
    if os.path.isdir(source):  # unlike Path.is_dir, it never raises
        return Path(source)
    if not HUB_ID.fullmatch(str(source)):
        raise UserError(
            f'{source or repr("")}: there is no such folder, and it is not a hub id '
            "like 'owner/name'"
        )
    return _download(str(source))


def _download(name: str) -> Path:
    import huggingface_hub  # slow to import, and rarely needed

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as error:
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise UserError(
            f'{name}: there is no such folder here, and it cannot be downloaded from the hub '
            f'({reason[0]})'
        ) from error


def _with_relative_text(
    content: StoredModel | StoredTokenizer, inside: Path
) -> tuple[StoredModel | StoredTokenizer, bool]:
    """The content with a text source relative to the folder, and whether `inside` contains it."""
    text = content.text if isinstance(content, StoredModel) else None
    path, inside = Path(text.source if text else ''), Path(os.path.realpath(inside))
    if text is None or not path.is_absolute() or not path.is_relative_to(inside):
        return content, False
    source = '/'.join([TEXT_SOURCE, *path.relative_to(inside).parts])
    return dataclasses.replace(content, text=dataclasses.replace(text, source=source)), True


def _describe(content: StoredModel | StoredTokenizer, tokenizer: StoredTokenizer) -> dict[str, Any]:
    """The content of config.json."""
    model = content if isinstance(content, StoredModel) else None
    kind = name_of(tokenizer.config)
    return {
        'family': name_of(model.config) if model else TOKENIZER_ONLY,
        'model': config.to_json(model.config) if model else None,
        'tokenizer': {structure.TAG: kind, **config.to_json(tokenizer.config)},
        'text': config.to_json(model.text) if model and model.text else None,
        'sampling': config.to_json(model.sampling) if model else None,
    }


def _read_config(folder: Path) -> dict[str, Any]:
    if not os.path.isdir(folder):
        raise UserError(f'{folder}: there is no such folder, expected a model folder')
    if not (folder / CONFIG).exists():
        raise UserError(f'{folder}: has no {CONFIG}, expected a model folder')
    data = config.read_json(folder / CONFIG)
    expected = {'family', 'model', 'tokenizer', 'text', 'sampling'}
    if not isinstance(data, dict) or data.keys() != expected:
        raise UserError(f'{folder / CONFIG}: expected the fields {", ".join(sorted(expected))}')
    return data


def _read_tokenizer(folder: Path, data: dict[str, Any], load: Load) -> StoredTokenizer:
    where = f'{folder / CONFIG}, tokenizer'
    fields = dict(data['tokenizer']) if isinstance(data['tokenizer'], dict) else {}
    kind = fields.pop(structure.TAG, None)
    cls = _look_up(TOKENIZERS, kind, f'{where}: {structure.TAG}')
    settings = config.from_json(cls, fields, where=where)
    return StoredTokenizer(config=settings, params=load(folder / TOKENIZER))


def _read_sampling(folder: Path, data: dict[str, Any]) -> Settings:
    if data['family'] == TOKENIZER_ONLY:
        raise UserError(f'{folder}: holds only a tokenizer, expected a model')
    return config.from_json(Settings, data['sampling'], where=f'{folder / CONFIG}, sampling')


def _look_up(known: Mapping[str, type], name: Any, where: str) -> type:
    if not isinstance(name, str) or name not in known:
        raise UserError(
            f'{where} {structure.show(name)} is unknown{structure.suggestion(name, known)}, '
            f'expected one of {", ".join(map(repr, known))}'
        )
    return known[name]


def check_free(folder: Path) -> None:
    """Raises UserError if no model folder can be written at `folder`."""
    files.check_folder(folder)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    try:
        _read_config(folder)
    except UserError as error:
        raise UserError(
            f'{folder}: holds something else than a model folder, and is not overwritten; '
            'choose another path or remove it'
        ) from error


def _is_model_file(name: str) -> bool:
    """Whether a file of that name is part of a model folder."""
    return MODEL_FILE.fullmatch(name) is not None
