"""How are safetensors files read and written that are larger than memory?

`StoredTensors` reads one array, or one row of it, at a time. A `StreamedArray` is computed part by
part while `write` writes it.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from star_jax import files
from star_jax.errors import UserError

# The names that the safetensors format has for types.
NAMES = {
    'float64': 'F64',
    'float32': 'F32',
    'float16': 'F16',
    'bfloat16': 'BF16',
    'int64': 'I64',
    'int32': 'I32',
    'int16': 'I16',
    'int8': 'I8',
    'uint64': 'U64',
    'uint32': 'U32',
    'uint16': 'U16',
    'uint8': 'U8',
    'bool': 'BOOL',
    'float8_e4m3fn': 'F8_E4M3',
    'float8_e5m2': 'F8_E5M2',
}
DTYPES = {short: jnp.dtype(name) for name, short in NAMES.items()}
RAW = ('F8_E4M3', 'F8_E5M2')  # types that the library does not read into numpy
BLOCK = 2**22  # elements that are checked at a time, to need little memory
ALIGNMENT = 8  # bytes; arrays start at multiples


class TensorSpec(NamedTuple):
    """Shape and type of an array.

    Attributes:
        shape: shape of the array.
        dtype: type of its elements.
    """

    shape: tuple[int, ...]
    dtype: np.dtype


class Tensors(Protocol):
    """Named arrays that are read on demand."""

    def specs(self) -> Mapping[str, TensorSpec]:
        """Shape and type of every array."""

    def read(self, name: str, row: int | None = None) -> np.ndarray:
        """An array, or one row of its first axis."""


@dataclasses.dataclass(frozen=True)
class StreamedArray:
    """An array that is computed while it is written.

    Attributes:
        shape: shape of the array.
        dtype: type of its elements.
        parts: returns arrays whose elements, one after the other, are those of the array.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    parts: Callable[[], Iterable[np.ndarray]]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


class StoredTensors:
    """The arrays of several safetensors files.

    Raises:
        UserError: a file is missing or damaged, or two files have an array of the same name.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._file = {}
        for path in paths:
            file = open_file(path)
            check_names(path, self._file.keys() & file.keys())
            self._file |= {name: (path, file, name) for name in file.offset_keys()}

    def names(self) -> list[str]:
        """The names of the arrays, in the order of the files."""
        return list(self._file)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of an array, whatever its type is."""
        _, file, stored = self._file[name]
        return tuple(file.get_slice(stored).get_shape())

    def specs(self) -> Mapping[str, TensorSpec]:
        return {name: self._spec(name) for name in self._file}

    def renamed(self, names: Mapping[str, str]) -> 'StoredTensors':
        """The arrays of `names`, which maps new names to those here."""
        renamed = StoredTensors([])
        renamed._file = {new: self._file[name] for new, name in names.items()}
        return renamed

    def read(self, name: str, row: int | None = None) -> np.ndarray:
        path, file, stored = self._file[name]
        spec = self._spec(name)
        if NAMES[spec.dtype.name] in RAW:
            array = _read_raw(path, stored, spec)
            return array if row is None else array[row]
        try:
            array = file.get_tensor(stored) if row is None else file.get_slice(stored)[row]
        except (AttributeError, TypeError, safetensors.SafetensorError) as error:
            raise UserError(
                f'{path}: {name} has type {spec.dtype}, which is not supported: save it in float32'
            ) from error
        return array.reshape(spec.shape if row is None else spec.shape[1:])

    def _spec(self, name: str) -> TensorSpec:
        path, file, stored = self._file[name]
        tensor = file.get_slice(stored)
        if tensor.get_dtype() not in DTYPES:
            raise UserError(f'{path}: {name} has type {tensor.get_dtype()}, which is not supported')
        return TensorSpec(tuple(tensor.get_shape()), DTYPES[tensor.get_dtype()])


def _read_raw(path: Path, name: str, spec: TensorSpec) -> np.ndarray:
    """An array of a type that the library does not support; it has checked the header."""
    with path.open('rb') as file:
        length = int.from_bytes(file.read(8), 'little')
        start, end = json.loads(file.read(length))[name]['data_offsets']
        file.seek(8 + length + start)
        return np.frombuffer(file.read(end - start), spec.dtype).reshape(spec.shape)


def check_names(path: Path, twice: Collection[str]) -> None:
    """Raises a UserError if a file has arrays that another file of the same tree has."""
    if twice:
        raise UserError(
            f'{path}: has {min(twice)}, which another of its files has, too: the files are of '
            'several models, fetch those of one'
        )


def open_file(path: Path) -> safetensors.safe_open:
    """Opens a safetensors file.

    Raises:
        UserError: the file is missing or damaged.
    """
    files.check_regular(path)
    try:
        return safetensors.safe_open(path, framework='np')
    except FileNotFoundError as error:
        flaw = 'no permission to read it' if path.is_file() else 'there is no such file'
        raise UserError(f'{path}: {flaw}') from error
    except OSError as error:
        raise UserError(f'{path}: cannot be read ({error})') from error
    except safetensors.SafetensorError as error:
        raise UserError(f'{path}: the file is damaged or was cut short ({error})') from error


def write(
    path: Path,
    flat: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
    not_finite: list[str] | None = None,
) -> str:
    """Writes arrays to a safetensors file, which is replaced atomically.

    Args:
        path: the file.
        flat: arrays, or `StreamedArray`s of which one part at a time is in memory, by name.
        metadata: strings to store beside the arrays.
        not_finite: to this list, names of arrays with NaN or infinite values are appended.

    Returns:
        SHA-256 of the file, hexadecimal.

    Raises:
        ValueError: the parts of an array differ from its shape or type.
    """
    # Wide types come first, so that every array starts at a multiple of its own width.
    names = sorted(flat, key=lambda name: (-flat[name].dtype.itemsize, name))
    header, end = {'__metadata__': dict(metadata)} if metadata else {}, 0
    for name in names:
        leaf = flat[name]
        start, end = end, end + leaf.nbytes
        kind = NAMES[leaf.dtype.name]
        header[name] = {'dtype': kind, 'shape': list(leaf.shape), 'data_offsets': [start, end]}
    text = json.dumps(header).encode()
    text += b' ' * (-len(text) % ALIGNMENT)
    with files.replacing(path) as temporary:
        digest = hashlib.sha256()
        with temporary.open('wb') as file:

            def append(content: Any) -> None:
                file.write(content)
                digest.update(content)

            append(len(text).to_bytes(8, 'little') + text)
            for name in names:
                if not _write_array(append, name, flat[name], check=not_finite is not None):
                    not_finite.append(name)
        temporary.chmod(0o644)
    return digest.hexdigest()


def append(file: BinaryIO, name: str, leaf: Any) -> None:
    """Appends the bytes of an array, or of a `StreamedArray`, to a file.

    Raises:
        ValueError: the parts of the array differ from its shape or type.
    """
    _write_array(file.write, name, leaf, check=False)


def is_finite(array: np.ndarray) -> bool:
    """Whether an array has no NaN or infinite value."""
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return True
    flat = array.reshape(-1)
    blocks = range(0, flat.size, BLOCK)
    return all(np.isfinite(flat[start : start + BLOCK]).all() for start in blocks)


def _write_array(append: Callable[[Any], None], name: str, leaf: Any, *, check: bool) -> bool:
    """Writes an array. Returns False if `check` is set and a value is NaN or infinite."""
    written, finite = 0, True
    for part in _parts(leaf):
        array = np.asarray(part, order='C')
        if array.dtype != leaf.dtype:
            raise ValueError(f'{name} of {leaf.dtype} has a part of {array.dtype}')
        append(array.reshape(-1).view(np.uint8))
        finite = finite and (not check or is_finite(array))
        written += array.nbytes
    if written != leaf.nbytes:
        raise ValueError(f'the parts of {name} have {written} bytes, its shape {leaf.nbytes}')
    return finite


def _parts(leaf: Any) -> Iterator[np.ndarray]:
    if isinstance(leaf, StreamedArray):
        yield from leaf.parts()
    else:
        yield jax.device_get(leaf)
