"""What lies in a model folder?

    config.json             {family, model, tokenizer, text: {source, sha256}, sampling}
    model.safetensors       the transformer ('/'-joined names, layers stacked)
    tokenizer.safetensors   the image tokenizer, always inside
    ignored.safetensors     what a published file held that nothing needs, for the way back to it
    text/                   a copy of the text encoder, unless config.json names another place

A folder of a tokenizer alone has the family 'tokenizer' and only that. The names of families and
tokenizers are those of the registry. Reading a folder executes no Python.
"""

import dataclasses
import hashlib
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from star_jax import files
from star_jax.checkpoint import config, structure, weights
from star_jax.core.settings import Settings
from star_jax.errors import UserError
from star_jax.families.registry import FAMILIES, TOKENIZERS, name_of
from star_jax.protocols import Family

CONFIG = 'config.json'
MODEL = 'model.safetensors'
TOKENIZER = 'tokenizer.safetensors'
IGNORED = 'ignored.safetensors'
INSIDE = 'text'
INSIDE_SOURCE = f'./{INSIDE}'  # how config.json names the text encoder in the folder itself
ALONE = 'tokenizer'  # the family of a folder without a transformer

OURS = re.compile(
    r'config\.json|text|ignored\.safetensors|(model|tokenizer)(-\d+-of-\d+)?\.safetensors(\.index\.json)?'
)
HUB_ID = re.compile(r'\w[\w.-]*/\w[\w.-]*')
HUB_FILES = ['*.json', '*.safetensors', '*.txt', '*.model']  # never pickled weights


Load = Callable[[Path], Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
    """Which text encoder a model was trained with: a package, path or hub id, and its SHA-256."""

    source: str
    sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """An image tokenizer: its config and its parameters."""

    config: Any
    params: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A transformer of a family, its tokenizer and its text encoder.

    Attributes:
        config: sizes and parts of the transformer; its class decides the family.
        params: parameters of the transformer.
        tokenizer: the image tokenizer.
        text: the text encoder that it was trained with, or None.
        sampling: the settings that its maker recommends.
    """

    config: Family
    params: Mapping[str, Any]
    tokenizer: Tokenizer
    text: Text | None
    sampling: Settings = Settings()


def write(
    folder: str | Path,
    content: Model | Tokenizer,
    fill: Callable[[Path], None] | None = None,
) -> None:
    """Writes a model, or a tokenizer alone, to a folder; `fill` may write there what goes with it.

    The folder appears whole or not at all. One that exists is replaced if it is a model folder
    (files in it that are not part of one are kept) and otherwise refused with a UserError. A text
    encoder that already lies in its `text/` stays there and counts as inside.
    """
    folder = Path(folder).absolute()
    check_free(folder)
    tokenizer = content.tokenizer if isinstance(content, Model) else content
    content, keeps_text = _with_own_text(content, folder / INSIDE)

    def is_replaced(name: str) -> bool:
        return _is_ours(name) and not (keeps_text and name == INSIDE)

    with files.replacing_folder(folder, is_replaced) as new:
        weights.save(new / TOKENIZER, tokenizer.params)
        if isinstance(content, Model):
            weights.save(new / MODEL, content.params)
        if fill:
            fill(new)
        config.write_json(new / CONFIG, _describe(content, tokenizer))


def read(folder: str | Path, load: Load = weights.load) -> Model:
    """The model in a folder, of a registered family.

    `load` reads parameters from the path of a file. Raises UserError if the folder is missing,
    damaged, of a family that is not registered, or holds a tokenizer alone.
    """
    folder = Path(folder)
    data = _read_config(folder)
    if data['family'] == ALONE:
        raise UserError(f'{folder}: holds a tokenizer alone, expected a model')
    cls = _look_up(FAMILIES, data['family'], f'{folder / CONFIG}: family')
    text = data['text'] and config.from_json(Text, data['text'], where=f'{folder / CONFIG}, text')
    if text and (text.source == INSIDE_SOURCE or text.source.startswith(f'{INSIDE_SOURCE}/')):
        text = dataclasses.replace(text, source=str(folder / text.source))
    return Model(
        config=config.from_json(cls, data['model'], where=f'{folder / CONFIG}, model'),
        params=load(folder / MODEL),
        tokenizer=_read_tokenizer(folder, data, load),
        text=text,
        sampling=_read_sampling(folder, data),
    )


def read_tokenizer(folder: str | Path, load: Load = weights.load) -> Tokenizer:
    """The tokenizer in any model folder, whatever else is in it; UserErrors as of `read`."""
    folder = Path(folder)
    return _read_tokenizer(folder, _read_config(folder), load)


def holds_tokenizer_alone(folder: str | Path) -> bool:
    """Whether a model folder has no transformer; UserErrors as of `read`."""
    return _read_config(Path(folder))['family'] == ALONE


def read_sampling(folder: str | Path) -> Settings:
    """The settings that the maker of a model recommends; UserErrors as of `read`."""
    folder = Path(folder)
    return _read_sampling(folder, _read_config(folder))


def digest(folder: str | Path) -> str:
    """SHA-256 over config and weights, hex; UserErrors as of `read`."""
    folder = Path(folder)
    _read_config(folder)
    whole = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if _is_ours(path.name) and path.is_file()):
        with path.open('rb') as file:
            content = hashlib.file_digest(file, 'sha256').hexdigest()
        whole.update(f'{path.name} {content}\n'.encode())
    return whole.hexdigest()


def find(place: str | Path) -> Path:
    """The folder that a user means: one on this machine or, of that form, a hub id `owner/name`.

    A hub id is downloaded to the hub's cache, configs and safetensors only. Raises UserError if
    there is neither.
    """
    if os.path.isdir(place):  # which, unlike Path.is_dir, never raises
        return Path(place)
    if not HUB_ID.fullmatch(str(place)):
        raise UserError(
            f"{place or repr('')}: there is no such folder, and it is no hub id like 'owner/name'"
        )
    return _download(str(place))


def _download(name: str) -> Path:
    import huggingface_hub  # slow to import, and rarely needed

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as error:
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise UserError(
            f'{name}: there is no such folder here, and it cannot be had from the hub ({reason[0]})'
        ) from error


def _with_own_text(content: Model | Tokenizer, inside: Path) -> tuple[Model | Tokenizer, bool]:
    """The content, and whether its text encoder lies in `inside`: it is then named from there."""
    text = content.text if isinstance(content, Model) else None
    place, inside = Path(text.source if text else ''), inside.resolve()
    if text is None or not place.is_absolute() or not place.is_relative_to(inside):
        return content, False
    source = '/'.join([INSIDE_SOURCE, *place.relative_to(inside).parts])
    return dataclasses.replace(content, text=dataclasses.replace(text, source=source)), True


def _describe(content: Model | Tokenizer, tokenizer: Tokenizer) -> dict[str, Any]:
    """The config.json of a folder."""
    model = content if isinstance(content, Model) else None
    kind = name_of(tokenizer.config)
    return {
        'family': name_of(model.config) if model else ALONE,
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


def _read_tokenizer(folder: Path, data: dict[str, Any], load: Load) -> Tokenizer:
    where = f'{folder / CONFIG}, tokenizer'
    fields = dict(data['tokenizer']) if isinstance(data['tokenizer'], dict) else {}
    kind = fields.pop(structure.TAG, None)
    cls = _look_up(TOKENIZERS, kind, f'{where}: {structure.TAG}')
    settings = config.from_json(cls, fields, where=where)
    return Tokenizer(config=settings, params=load(folder / TOKENIZER))


def _read_sampling(folder: Path, data: dict[str, Any]) -> Settings:
    if data['family'] == ALONE:
        raise UserError(f'{folder}: holds a tokenizer alone, expected a model')
    return config.from_json(Settings, data['sampling'], where=f'{folder / CONFIG}, sampling')


def _look_up(known: Mapping[str, type], name: Any, where: str) -> type:
    if not isinstance(name, str) or name not in known:
        raise UserError(
            f'{where} {structure.show(name)} is unknown{structure.guess(name, known)}, '
            f'expected one of {", ".join(map(repr, known))}'
        )
    return known[name]


def check_free(folder: Path) -> None:
    """Raises UserError where no model folder can be written at `folder`."""
    files.check_folder(folder)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    try:
        _read_config(folder)
    except UserError as error:
        raise UserError(
            f'{folder}: holds something else than a model folder, and is not overwritten; '
            'name another place or remove it'
        ) from error


def _is_ours(name: str) -> bool:
    """Whether a file of that name belongs to a model folder."""
    return OURS.fullmatch(name) is not None
