"""How is a published file converted to a model folder, and a folder back to published files?

Only one tensor at a time is in memory. Every tensor of a file is a parameter, a buffer that follows
from the sizes, or ignored for a known reason. The folder keeps ignored tensors in
`ignored.safetensors`, so that the conversion back returns every tensor.
"""

import dataclasses
import functools
import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from star_jax import files
from star_jax.checkpoint import folder, models, weights
from star_jax.checkpoint.stored import (
    NAMES,
    StoredTensors,
    StreamedArray,
    Tensors,
    TensorSpec,
    write,
)
from star_jax.convert import infer, published
from star_jax.convert.infer import ModelOptions
from star_jax.convert.published import StateDict
from star_jax.convert.table import ConversionTable
from star_jax.convert.writers import Writer
from star_jax.core.settings import Settings, StableSettings
from star_jax.errors import UserError
from star_jax.families.fit import check_tokenizer
from star_jax.families.infinity import PATCHED_BITS, Infinity
from star_jax.families.llamagen import LlamaGen, LlamaGenText
from star_jax.families.star import Star
from star_jax.protocols import Family, TokenizerConfig
from star_jax.text.encoder_folder import CONFIG, INDEX, absolute_source, locate

QUANTISER = 'quantize.'  # prefix of the ignored tensors of a tokenizer
# Metadata of `ignored.safetensors`, of each part: the types of tensors that are stored in another
# one, and the hint of its layout.
TYPES, HINT = 'types', 'names'


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextSource:
    """The text encoder that a converted model gets.

    Attributes:
        source: a folder, `package:NAME` or hub id.
        inside: copy it into the model folder; otherwise the folder names its source.
    """

    source: str
    inside: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selection:
    """Which weights of a file are converted.

    Attributes:
        part: which state dict to take of several of a kind (see `published.read`).
        allow_nonfinite: accept NaN and infinite weights.
        check: compare the tokenizer's model folder with the SHA-256 that it keeps.
    """

    part: str = ''
    allow_nonfinite: bool = False
    check: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertedPart:
    """A published state dict whose tensors passed the check of its table.

    Attributes:
        config: the inferred config.
        table: the conversion table of the config.
        source: the state dict.
        params: the parameters, each read when it is written.
        not_finite: names of tensors with NaN or infinite values, once all are written.
        where: the file.
    """

    config: Family | TokenizerConfig
    table: ConversionTable
    source: StateDict
    params: Mapping[str, Any]
    not_finite: list[str]
    where: str

    @property
    def tensors(self) -> Tensors:
        return self.source.tensors

    @property
    def converted_types(self) -> dict[str, str]:
        return self.table.converted_types(self.tensors, self.params)

    @property
    def ignored(self) -> dict[str, StreamedArray]:
        specs = self.tensors.specs()
        return {
            name: _unchanged(self.tensors, name, specs) for name in self.table.ignored_names(specs)
        }

    @property
    def parameters(self) -> int:
        return sum(math.prod(leaf.shape) for leaf in self.table.abstract.values())


def to_folder(
    file: Path,
    out: Path,
    options: ModelOptions,
    tokenizer: str = '',
    text: TextSource | None = None,
    selection: Selection = Selection(),
) -> tuple[dict[str, ConvertedPart], tuple[str, ...]]:
    """Converts a published file to a model folder.

    Args:
        file: the published file.
        out: the folder to write.
        options: fields of the config that the file does not contain.
        tokenizer: published file or model folder of the tokenizer, for files without one.
        text: the text encoder, if the model has one.
        selection: which weights are converted.

    Returns:
        The parts of the file by name ('transformer', 'tokenizer', or both), and the places of its
        other tensors.

    Raises:
        UserError: a file is not a published model, has weights that are not finite, or the folder
            cannot be written.
    """
    folder.check_free(out)
    source = published.read(file, selection.part)
    state_dicts = dict(source.parts)
    image_tokenizer = ignored_file = None
    if tokenizer and published.is_file(tokenizer):
        other = published.read(Path(tokenizer), selection.part, required=False)
        if 'tokenizer' not in other.parts:
            raise UserError(f'{tokenizer} holds no tokenizer')
        state_dicts |= {'tokenizer': other.parts['tokenizer']}
    elif tokenizer:
        image_tokenizer = models.read_tokenizer(tokenizer, selection.check)
        ignored_file = folder.find(tokenizer) / folder.IGNORED
    parts, model = {}, None
    if 'transformer' in state_dicts:
        infer_model = functools.partial(infer.transformer, options=options)
        parts['transformer'] = part = _part(state_dicts['transformer'], infer_model, str(file))
        model = part.config
    if 'tokenizer' in state_dicts and image_tokenizer is None:
        infer_tokenizer = functools.partial(infer.tokenizer, options=options, model=model)
        where = tokenizer or str(file)
        parts['tokenizer'] = _part(state_dicts['tokenizer'], infer_tokenizer, where)
        image_tokenizer = _tokenizer(parts['tokenizer'])
    if image_tokenizer is None:
        raise UserError(
            f'{file} has no image tokenizer, and a model folder needs one: give its file, or the '
            'folder of a model with the same tokenizer, with --tokenizer'
        )
    content: Any = image_tokenizer
    if 'transformer' in parts:
        content = _model(parts['transformer'], image_tokenizer, text, str(file))

    def fill(new: Path) -> None:
        if not selection.allow_nonfinite:
            _refuse_nonfinite(parts.values())
        _write_ignored(new / folder.IGNORED, parts, ignored_file)
        if text and text.inside:
            _copy_text(text.source, new / folder.TEXT)

    with files.writing(out):
        folder.write(out, content, fill, allow_nonfinite=True)  # `fill` has refused them
    return parts, source.unused


def to_files(model_folder: Path, out: Path, writer: Writer, check: bool = True) -> list[Path]:
    """Converts a model folder to state dicts with the published names, in the folder `out`.

    Args:
        model_folder: the model folder.
        out: the folder of the files.
        writer: writes the state dict of a part.
        check: compare the weights with the SHA-256 that the model folder keeps.

    Returns:
        The written files; of several with an index, the index.

    Raises:
        UserError: there is no model folder, it cannot be read, or its weights changed; `out` is a
            model folder; or the writer cannot write such a model.
    """
    files.check_folder(out)
    if (out / folder.CONFIG).exists():
        raise UserError(f'{out} is a model folder (it has a {folder.CONFIG}): give another --out')
    alone = folder.has_only_tokenizer(model_folder)
    path = model_folder / folder.IGNORED
    ignored = StoredTensors([path]) if path.exists() else None
    metadata = weights.read_metadata(path) if ignored else {}
    states = {}
    with models.verifying(model_folder, check):  # before anything is written
        model = None if alone else folder.read(model_folder, _open)
        tokenizer = model.tokenizer if model else folder.read_tokenizer(model_folder, _open)
        for name, part in {'transformer': model, 'tokenizer': tokenizer}.items():
            if part is None:
                continue
            hint = metadata.get(f'{HINT} of the {name}', '')
            table = ConversionTable.from_config(part.config, [hint] if hint else [])
            writer.check(table.layout)
            params = _checked(part.params, table, model_folder / f'{name}')
            state = table.state(params, _types(metadata, name, path))
            if ignored:
                state |= _ignored_of(ignored, of_tokenizer=name == 'tokenizer')
            states[name] = state, table.layout
    with files.writing(out):
        out.mkdir(parents=True, exist_ok=True)
        return [writer.write(out, name, state, layout) for name, (state, layout) in states.items()]


def _part(source: StateDict, infer_config: Callable[..., Any], where: str) -> ConvertedPart:
    tensors, not_finite = source.tensors, []
    try:
        specs = tensors.specs()
        config = infer_config(specs)
    except UserError as error:
        raise UserError(f'{where}: {error}') from error
    table = ConversionTable.from_config(config, specs)
    table.check(tensors, where)
    return ConvertedPart(
        config=config,
        table=table,
        source=source,
        params=table.params(tensors, not_finite),
        not_finite=not_finite,
        where=where,
    )


def _refuse_nonfinite(parts: Iterable[ConvertedPart]) -> None:
    """Raises UserError if the parts, which have been read, have weights that are not finite."""
    for part in parts:
        if part.not_finite:
            raise UserError(
                f'{part.where}: NaN or infinite weights ({weights.listed(part.not_finite)}), of '
                'which no model makes images: get another file, or convert it as it is with '
                '--allow-nonfinite'
            )


def _tokenizer(part: ConvertedPart) -> folder.StoredTokenizer:
    return folder.StoredTokenizer(config=part.config, params=part.params)


def _model(
    part: ConvertedPart, tokenizer: folder.StoredTokenizer, text: TextSource | None, where: str
) -> folder.StoredModel:
    remedy = 'give the tokenizer that the model was trained with'
    check_tokenizer(part.config, tokenizer.config, where=where, remedy=remedy)
    if text and not part.config.text_width:
        raise UserError(f'{where} is a class-conditional model and reads no text: leave --text out')
    return folder.StoredModel(
        config=part.config,
        params=part.params,
        tokenizer=dataclasses.replace(tokenizer, config=tokenizer.config.at(part.config.schedule)),
        text=_reference(text) if text else None,
        sampling=_published_sampling(part.config),
    )


def _published_sampling(config: Family) -> Settings:
    """The sampling settings of the publications (STAR specification 8 and 11, Infinity
    specification 7, LlamaGen specification 3.4)."""
    if isinstance(config, LlamaGen):
        return Settings(guidance=4.0, top_k=2000, top_p=0.0)
    if isinstance(config, LlamaGenText):
        return Settings(guidance=7.5, top_k=1000, top_p=0.0)
    if isinstance(config, Infinity):
        patched = config.bits == PATCHED_BITS
        guidance, temperature = (3.0, 1.0) if patched else (4.0, 0.5)
        return Settings(guidance=guidance, top_k=0, top_p=0.97, temperature=temperature)
    if not isinstance(config, Star):
        return Settings(guidance=1.5, top_k=900, top_p=0.96)
    if config.refinement:
        stable = StableSettings(version='1024')
        return Settings(guidance=4.0, top_k=config.codes, top_p=0.8, stable=stable)
    return Settings(guidance=4.0, top_k=600, top_p=0.8)


def _reference(text: TextSource) -> folder.TextEncoderReference:
    source = folder.TEXT_SOURCE if text.inside else absolute_source(text.source)
    return folder.TextEncoderReference(source=source, sha256=locate(text.source).sha256())


def _copy_text(source: str, to: Path) -> None:
    encoder = locate(source)
    to.mkdir()
    index = [path for path in [encoder.path / INDEX] if path.is_file()]
    for path in (encoder.path / CONFIG, *index, *encoder.weights, *encoder.tokenizer):
        shutil.copyfile(path, to / path.name)


def _write_ignored(path: Path, parts: Mapping[str, ConvertedPart], earlier: Path | None) -> None:
    """Writes the ignored tensors of the parts and those of the tokenizer's folder in `earlier`."""
    ignored, notes = {}, {}
    if earlier and earlier.exists():
        ignored = _ignored_of(StoredTensors([earlier]), of_tokenizer=True)
        notes = {k: v for k, v in weights.read_metadata(earlier).items() if 'transformer' not in k}
    for name, part in parts.items():
        ignored |= part.ignored
        if hint := part.table.layout.hint:
            notes |= {f'{HINT} of the {name}': hint}
        if types := part.converted_types:
            notes |= {f'{TYPES} of the {name}': json.dumps(types)}
    if ignored or notes:
        write(path, ignored, notes)


def _types(metadata: Mapping[str, str], name: str, path: Path) -> dict[str, str]:
    """The types that the tensors of a part had in its file, where they differ."""
    text = metadata.get(f'{TYPES} of the {name}', '{}')
    try:
        types = files.parse_json(text)
        if NAMES.keys() >= set(types.values()):
            return types
    except (ValueError, AttributeError, TypeError):
        pass
    raise UserError(f'{path}: its metadata name no types of tensors: convert the file again')


def _open(path: Path) -> StoredTensors:
    return StoredTensors(weights.paths(path))


def _checked(params: StoredTensors, table: ConversionTable, where: Path) -> StoredTensors:
    """The arrays of a folder; UserError unless they fit its config."""
    if flaws := weights.mismatches(params.specs(), table.abstract, weights.fits):
        raise UserError(f'{where}: the arrays do not fit its config: {flaws}')
    return params


def _ignored_of(ignored: Tensors, *, of_tokenizer: bool) -> dict[str, StreamedArray]:
    """The ignored tensors of the tokenizer, or those of the transformer."""
    specs = ignored.specs()
    names = [name for name in specs if name.startswith(QUANTISER) == of_tokenizer]
    return {name: _unchanged(ignored, name, specs) for name in names}


def _unchanged(tensors: Tensors, name: str, specs: Mapping[str, TensorSpec]) -> StreamedArray:
    return StreamedArray(*specs[name], lambda: [tensors.read(name)])
