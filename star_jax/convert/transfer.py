"""How does a published file become a model folder, and a folder the originals' files?

Tensor by tensor: never is more than one of them in memory. Every tensor of a file is a parameter,
or made again from the sizes (`buffers`), or ignored for a known reason; those of the last kind
travel in the folder's `ignored.safetensors`, so that the way back gives every tensor again.
"""

import dataclasses
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from star_jax import files
from star_jax.checkpoint import folder, models, weights
from star_jax.checkpoint.stored import Form, Stored, Streamed, Tensors, write
from star_jax.convert import infer, published
from star_jax.convert.infer import Unsaid
from star_jax.convert.table import Table
from star_jax.core.schedule import Grids
from star_jax.core.settings import Settings, StableSettings
from star_jax.errors import UserError
from star_jax.families.star import Star
from star_jax.protocols import Family
from star_jax.text.folder import CONFIG, INDEX, full_name, locate
from star_jax.tokenizers.residual_vq import VQ

QUANTISER = 'quantize.'  # how the names of a tokenizer's ignored tensors begin
PHIS = 'phis'  # the metadata of ignored tensors that say how the file calls its phis
STATE = 'state_dict.safetensors'
OUT = {'transformer': f'transformer.{STATE}', 'tokenizer': f'tokenizer.{STATE}'}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
    """The text encoder of a model: a folder, package or hub id, copied into the folder or named."""

    source: str
    inside: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """A state dict, what it is, and the table that its tensors passed."""

    config: Family | VQ
    table: Table
    tensors: Tensors

    @property
    def ignored(self) -> dict[str, Streamed]:
        forms = self.tensors.forms()
        return {name: _same(self.tensors, name, forms) for name in self.table.left_over(forms)}

    @property
    def parameters(self) -> int:
        return sum(math.prod(leaf.shape) for leaf in self.table.abstract.values())


def to_folder(
    file: Path, out: Path, unsaid: Unsaid, tokenizer: str = '', text: Text | None = None
) -> dict[str, Part]:
    """Writes the model folder of a published file; what was in the file.

    `tokenizer` is a published file or a model folder, for files that have none of their own. Raises
    UserError for files that are no such model, and where the folder cannot be written.
    """
    folder.check_free(out)
    found = published.read(file)
    other = carried = None
    if tokenizer and Path(tokenizer).suffix in published.SUFFIXES:
        beside = published.read(Path(tokenizer))
        if 'tokenizer' not in beside:
            raise UserError(f'{tokenizer} holds no tokenizer')
        found |= {'tokenizer': beside['tokenizer']}
    elif tokenizer:
        other = models.read_tokenizer(tokenizer)
        carried = models.locate(tokenizer) / folder.IGNORED
    parts, grids = {}, ()
    if 'transformer' in found:
        parts['transformer'] = part = _part(found['transformer'], unsaid, str(file))
        grids = part.config.schedule.grids
    if 'tokenizer' in found and other is None:
        where = tokenizer or str(file)
        parts['tokenizer'] = _part(found['tokenizer'], unsaid, where, grids)
        other = _tokenizer(parts['tokenizer'])
    if other is None:
        raise UserError(
            f'{file} has no image tokenizer, and a model folder needs one: give its file or the '
            'folder of a model that has the same with --tokenizer'
        )
    content: Any = other
    if 'transformer' in parts:
        content = _model(parts['transformer'], other, text, str(file))

    def fill(new: Path) -> None:
        _write_ignored(new / folder.IGNORED, parts.values(), carried)
        if text and text.inside:
            _copy_text(text.source, new / folder.INSIDE)

    with files.writing(out):
        folder.write(out, content, fill)
    return parts


def to_files(place: Path, out: Path) -> list[Path]:
    """Writes the state dicts of a model folder, in the originals' names, to the folder `out`.

    Raises UserError where there is no model folder, or one that cannot be read.
    """
    files.check_folder(out)
    alone = folder.holds_tokenizer_alone(place)
    load = _open
    model = None if alone else folder.read(place, load)
    tokenizer = model.tokenizer if model else folder.read_tokenizer(place, load)
    path = place / folder.IGNORED
    ignored = Stored([path]) if path.exists() else None
    names = [weights.read_metadata(path).get(PHIS, '')] if ignored else []
    written = []
    for name, part in {'transformer': model, 'tokenizer': tokenizer}.items():
        if part is None:
            continue
        table = Table.of(part.config, _phi_names(names, part.config))
        state = table.state(_checked(part.params, table, place / f'{name}'))
        if ignored:
            state |= _of_tokenizer(ignored, name == 'tokenizer')
        written.append(out / OUT[name])
        with files.writing(out):
            out.mkdir(parents=True, exist_ok=True)
            write(written[-1], state)
    return written


def _part(tensors: Tensors, unsaid: Unsaid, where: str, grids: Grids = ()) -> Part:
    forms = tensors.forms()
    try:
        if published.OF_TOKENIZER in forms:
            config = infer.tokenizer(forms, unsaid, grids)
        else:
            config = infer.transformer(forms, unsaid)
    except UserError as error:
        raise UserError(f'{where}: {error}') from error
    table = Table.of(config, forms)
    table.check(tensors, where)
    return Part(config=config, table=table, tensors=tensors)


def _tokenizer(part: Part) -> folder.Tokenizer:
    return folder.Tokenizer(config=part.config, params=part.table.params(part.tensors))


def _model(part: Part, tokenizer: folder.Tokenizer, text: Text | None, where: str) -> folder.Model:
    for name in ('codes', 'channels'):
        if getattr(part.config, name) != getattr(tokenizer.config, name):
            raise UserError(
                f'{where} predicts {getattr(part.config, name)} {name}, and its tokenizer has '
                f'{getattr(tokenizer.config, name)}: give the one that it was trained with'
            )
    reads_text = isinstance(part.config, Star)
    if text and not reads_text:
        raise UserError(f'{where} is a model of classes and reads no text: leave --text out')
    return folder.Model(
        config=part.config,
        params=part.table.params(part.tensors),
        tokenizer=dataclasses.replace(tokenizer, config=tokenizer.config.at(part.config.schedule)),
        text=_reference(text) if text else None,
        sampling=_published_sampling(part.config),
    )


def _published_sampling(config: Family) -> Settings:
    """The settings of the originals' own images (STAR specification 8 and 11)."""
    if not isinstance(config, Star):
        return Settings(guidance=1.5, top_k=900, top_p=0.96)
    if config.refinement:
        stable = StableSettings(version='1024')
        return Settings(guidance=4.0, top_k=config.codes, top_p=0.8, stable=stable)
    return Settings(guidance=4.0, top_k=600, top_p=0.8)


def _reference(text: Text) -> folder.Text:
    source = folder.INSIDE_SOURCE if text.inside else full_name(text.source)
    return folder.Text(source=source, sha256=locate(text.source).sha256())


def _copy_text(source: str, to: Path) -> None:
    found = locate(source)
    to.mkdir()
    index = [path for path in [found.path / INDEX] if path.is_file()]
    for path in (found.path / CONFIG, *index, *found.weights, *found.tokenizer):
        shutil.copyfile(path, to / path.name)


def _write_ignored(path: Path, parts: Iterable[Part], carried: Path | None) -> None:
    """What was ignored of the parts, and of the folder's tokenizer that has `carried` beside it."""
    ignored, phis = {}, {}
    if carried and carried.exists():
        ignored = _of_tokenizer(Stored([carried]), True)
        phis = weights.read_metadata(carried)
    for part in parts:
        ignored |= part.ignored
        if isinstance(part.config, VQ):
            first = next(e.theirs for e in part.table.entries if e.ours == 'quantiser/phi_kernel')
            phis = {PHIS: first}
    if ignored or phis:
        write(path, ignored, phis)


def _phi_names(first: Sequence[str], config: Family | VQ) -> list[str]:
    """The names of all phi kernels from that of the first ('' or none: as published)."""
    if not isinstance(config, VQ):
        return []
    given = next(iter(first), '')
    if given.endswith('.0.weight'):
        return [given.replace('.0.weight', f'.{phi}.weight') for phi in range(config.phis)]
    return [given]


def _open(path: Path) -> Stored:
    return Stored(weights.paths(path))


def _checked(params: Stored, table: Table, where: Path) -> Stored:
    """The arrays of a folder; UserError unless they are those of its config."""
    if flaws := weights.mismatches(params.forms(), table.abstract, weights.fits):
        raise UserError(f'{where}: the arrays are not those of its config: {flaws}')
    return params


def _of_tokenizer(ignored: Tensors, wanted: bool) -> dict[str, Streamed]:
    """The ignored tensors of a tokenizer, or those of a transformer."""
    forms = ignored.forms()
    own = [name for name in forms if name.startswith(QUANTISER) == wanted]
    return {name: _same(ignored, name, forms) for name in own}


def _same(tensors: Tensors, name: str, forms: Mapping[str, Form]) -> Streamed:
    return Streamed(*forms[name], lambda: [tensors.read(name)])
