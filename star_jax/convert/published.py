"""Which state dicts does a published file contain?

A file is safetensors, or a file of torch. It is the state dict of a VAR, a STAR, an Infinity, a
LlamaGen or a tokenizer, or nested dicts with some of them, such as the file of a trainer of STAR
(STAR specification 10) or of Infinity (Infinity specification 9), or of Lightning. A tensor that
every model of a kind has identifies its state dict, whatever precedes its name: names of wrappers
(`module.`) and the path in the file (`state_dict`, `model.`) are removed.
"""

import collections
import dataclasses
import itertools
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from star_jax import files
from star_jax.checkpoint import weights
from star_jax.checkpoint.stored import StoredTensors, Tensors
from star_jax.convert import torch_files
from star_jax.convert.torch_files import TorchTensors
from star_jax.errors import UserError

SUFFIXES = ('.pth', '.pt', '.bin', '.ckpt', '.tar', '.safetensors', '.index.json')
INDEX = '.index.json'
# Tensors of which any identifies a state dict.
KINDS = {
    'transformer': ('word_embed.weight', 'tok_embeddings.weight'),
    'tokenizer': ('quantize.embedding.weight', 'quantizer.lfq.mask', 'quantize.lfq.mask'),
}
# Names that DistributedDataParallel, torch.compile, Lightning, FSDP and activation checkpoints put
# into names.
WRAPPERS = frozenset(
    (
        *('module', '_orig_mod', '_forward_module'),
        *('_fsdp_wrapped_module', '_fpw_module', '_checkpoint_wrapped_module'),
    )
)
CHUNKS = 'block_chunks'  # in Infinity's names, which have the word `module` in each chunk
FLAT = '_flat_param'  # ending of the tensors of FSDP that contain many parameters
EMA = re.compile(r'(?:.*[._])?ema(?:[._].*)?', re.IGNORECASE)
SAFETENSORS_HEADER = 100_000_000  # most bytes of a header
DEEPEST = 16  # most dicts inside each other
EXPECTED = 'expected the dict of a trainer, or the state dict of a transformer or of a tokenizer'


@dataclasses.dataclass(frozen=True, kw_only=True)
class StateDict:
    """A state dict in a file.

    Attributes:
        tensors: its tensors by their published names.
        path: its dotted path in the file ('': it is the file).
        wrappers: the names of wrappers that were removed.
        others: paths of further state dicts of the same kind.
    """

    tensors: Tensors
    path: str = ''
    wrappers: tuple[str, ...] = ()
    others: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublishedFile:
    """The content of a file.

    Attributes:
        parts: its state dicts under 'transformer', 'tokenizer', or both.
        unused: places of its other tensors.
    """

    parts: Mapping[str, StateDict]
    unused: tuple[str, ...]


def is_file(source: str) -> bool:
    """Whether a source names a published file, not a folder or a hub id."""
    return os.path.isfile(source) or source.lower().endswith(SUFFIXES)


def read(path: Path, part: str = '', *, required: bool = True) -> PublishedFile:
    """Reads the state dicts of a file.

    Args:
        path: the file, or the index of several safetensors files.
        part: which one to take if the file has several of a kind: a word of its path ('': that of
            an exponential moving average).
        required: whether to refuse a file without `part`.

    Raises:
        UserError: the file is missing, damaged or of another layout, contains classes that are not
            known to be harmless, or needs torch, which is not installed.
    """
    dicts = list(_dicts(path))
    found = [candidate for tensors in dicts for candidate in _candidates(*tensors)]
    if not found:
        raise _layout_error(path, [name for _, tensors in dicts for name in tensors.names()])
    if part and required and not any(each.has(part) for each in found):
        raise UserError(f'{path} has no state dict {part!r}: it has {_paths(found)}')
    by_kind = {kind: [each for each in found if each.kind == kind] for kind in KINDS}
    chosen = {kind: _choose(some, part, path) for kind, some in by_kind.items() if some}
    parts = {
        kind: StateDict(
            tensors=candidate.tensors.renamed(candidate.names),
            path=candidate.path,
            wrappers=candidate.wrappers,
            others=tuple(each.path for each in by_kind[kind] if each is not candidate),
        )
        for kind, candidate in chosen.items()
    }
    return PublishedFile(parts=parts, unused=tuple(_unused(dicts, list(chosen.values()))))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Candidate:
    """A state dict in a dict of tensors.

    Attributes:
        kind: 'transformer' or 'tokenizer'.
        path: dotted path in the file.
        tensors: the tensors of the dict.
        names: published names and those in the dict.
        duplicates: published names that two tensors of the dict have.
        wrappers: names of wrappers that were removed.
    """

    kind: str
    path: str
    tensors: Any
    names: Mapping[str, str]
    duplicates: tuple[str, ...]
    wrappers: tuple[str, ...]

    def has(self, part: str) -> bool:
        """Whether `part` is its path or a word of it."""
        return part in (self.path, *self.path.split('.'))


def _dicts(path: Path) -> Iterator[tuple[str, Any]]:
    """The dotted path and the tensors of every dict in a file."""
    shards = [path]
    if path.name.lower().endswith(INDEX):
        shards = weights.paths(path.with_name(path.name[: -len(INDEX)]))
    are_torch = [_is_torch(shard) for shard in shards]
    if not any(are_torch):
        yield '', StoredTensors(shards)
    elif len(shards) == 1:
        yield from _torch_dicts(path)
    elif all(are_torch):
        dicts = [(shard, found) for shard in shards for _, found in _torch_dicts(shard)]
        yield '', TorchTensors.merged(dicts)
    else:
        raise UserError(f'{path} names files of torch beside safetensors: give one kind of file')


def _torch_dicts(path: Path) -> Iterator[tuple[str, TorchTensors]]:
    content = torch_files.load(path)
    if not isinstance(content, Mapping):
        raise UserError(f'{_not_published(path)}: it holds a {type(content).__name__}; {EXPECTED}')
    visited: set[int] = set()
    pending = [((), content)]
    while pending:
        keys, inner = pending.pop()
        if id(inner) in visited or len(keys) > DEEPEST:
            continue
        visited.add(id(inner))
        named = [(str(key), value) for key, value in inner.items()]
        if tensors := {name: value for name, value in named if torch_files.is_tensor(value)}:
            yield '.'.join(keys), TorchTensors(tensors)
        pending += [((*keys, name), x) for name, x in named[::-1] if isinstance(x, Mapping)]


def _is_torch(path: Path) -> bool:
    """Whether a file is one of torch, not safetensors. Raises UserError if it is neither."""
    files.check_regular(path)
    try:
        with path.open('rb') as file:
            head = file.read(torch_files.HEAD)
    except FileNotFoundError as error:
        raise UserError(f'{path}: there is no such file') from error
    except OSError as error:
        raise UserError(f'{path}: cannot be read ({error.strerror})') from error
    if head[8:9] == b'{' and int.from_bytes(head[:8], 'little') <= SAFETENSORS_HEADER:
        return False
    if torch_files.is_torch(head):
        return True
    if path.suffix.lower() == '.safetensors':
        return False
    raise UserError(
        f'{path} is not a torch file, or the download failed (a git-lfs pointer, a web page): '
        'fetch it again'
    )


def _candidates(path: str, tensors: Any) -> Iterator[_Candidate]:
    """The state dicts among the tensors of one dict."""
    # Averaged models count their updates (`n_averaged`, `decay`); no weight is a single number.
    names = [name for name in tensors.names() if '.' in name or math.prod(tensors.shape(name)) > 1]
    plain = {name: _without_wrappers(name) for name in names}
    found = {
        (kind, name.removesuffix(tensor))
        for name in plain.values()
        for kind, tensors_of_kind in KINDS.items()
        for tensor in tensors_of_kind
        if name == tensor or name.endswith(f'.{tensor}')
    }
    prefixes = sorted({prefix for _, prefix in found}, key=len, reverse=True)
    # A tensor belongs to the longest of the prefixes of its name.
    owner = {n: next((p for p in prefixes if plain[n].startswith(p)), None) for n in names}
    for kind, prefix in sorted(found):
        mine = [name for name in names if owner[name] == prefix]
        short = [plain[name].removeprefix(prefix) for name in mine]
        removed = (word for name in mine for word in _wrappers(name))
        yield _Candidate(
            kind=kind,
            path='.'.join(filter(None, [path, prefix.removesuffix('.')])),
            tensors=tensors,
            names=dict(zip(short, mine, strict=True)),
            duplicates=tuple(name for name, n in collections.Counter(short).items() if n > 1),
            wrappers=tuple(dict.fromkeys(removed)),
        )


def _choose(found: Sequence[_Candidate], part: str, path: Path) -> _Candidate:
    """The state dict to take among those of a kind."""
    asked = [each for each in found if part and each.has(part)]
    averaged = [each for each in found if EMA.fullmatch(each.path)]
    choice = next((some for some in (asked, found, averaged) if len(some) == 1), None)
    if choice is None or len(asked) > 1:
        raise UserError(
            f'{path} has several state dicts of a {found[0].kind} ({_paths(asked or found)}): '
            'choose one with --part NAME'
        )
    if flaws := choice[0].duplicates:
        raise UserError(
            f'{path} has two tensors {flaws[0]}, with and without the names of wrappers: save the '
            'state dict of one model'
        )
    return choice[0]


def _unused(dicts: Sequence[tuple[str, Any]], chosen: Sequence[_Candidate]) -> list[str]:
    """The places of the tensors that no chosen state dict has."""
    used = {(id(each.tensors), name) for each in chosen for name in each.names.values()}
    left = (
        f'{path}.{_without_wrappers(name)}'.lstrip('.')
        for path, tensors in dicts
        for name in tensors.names()
        if (id(tensors), name) not in used
    )
    heads = {word for each in chosen for word in each.path.split('.')}
    return list(dict.fromkeys(_head_of(name, heads) for name in left))


def _head_of(name: str, heads: set[str]) -> str:
    """The first words of a name, up to the first that is none of `heads`."""
    words = name.split('.')
    more = next((n for n, word in enumerate(words) if word not in heads), len(words) - 1)
    return '.'.join(words[: more + 1])


def _paths(found: Sequence[_Candidate]) -> str:
    return ', '.join(each.path or 'the file itself' for each in found)


def _without_wrappers(name: str) -> str:
    kept: list[str] = []
    for word in name.split('.'):
        if word not in WRAPPERS or (word == 'module' and kept[-2:-1] == [CHUNKS]):
            kept.append(word)
    return '.'.join(kept)


def _wrappers(name: str) -> list[str]:
    """The names of wrappers in a name."""
    left = collections.Counter(name.split('.')) - collections.Counter(
        _without_wrappers(name).split('.')
    )
    return list(left.elements())


def _not_published(path: Path) -> str:
    return f'{path} is not a published STAR, VAR, Infinity, LlamaGen or tokenizer file'


def _layout_error(path: Path, names: Sequence[str]) -> UserError:
    flaw = f'it has none of {", ".join(itertools.chain(*KINDS.values()))}'
    if any(name.endswith(FLAT) for name in names):
        flaw = 'it holds flat parameters of FSDP: save a full state dict'
    return UserError(f'{_not_published(path)}: {flaw}; {EXPECTED}')
