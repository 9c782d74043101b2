"""How are arrays read and written that are larger together than the memory?

`Stored` knows what lies in safetensors files and reads one array, or one row of one, at a time.
`Streamed` stands for an array that is made piece by piece while `write` writes it.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from star_jax import files
from star_jax.errors import UserError

# The format's names of the types that arrays have.
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
}
DTYPES = {short: jnp.dtype(name) for name, short in NAMES.items()}
ALIGNMENT = 8  # bytes; arrays begin at multiples


class Form(NamedTuple):
    """What is known of an array that is not read."""

    shape: tuple[int, ...]
    dtype: np.dtype


class Tensors(Protocol):
    """Named arrays that are read when they are asked for."""

    def forms(self) -> Mapping[str, Form]:
        """Shape and type of every array."""

    def read(self, name: str, row: int | None = None) -> np.ndarray:
        """An array, or one row of its first axis."""


@dataclasses.dataclass(frozen=True)
class Streamed:
    """An array whose elements come in order, in parts that together have its shape."""

    shape: tuple[int, ...]
    dtype: np.dtype
    parts: Callable[[], Iterable[np.ndarray]]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


class Stored:
    """The arrays of safetensors files. Raises UserError where one is missing or damaged."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._file = {}
        for path in paths:
            file = open_file(path)
            self._file |= dict.fromkeys(file.keys(), (path, file))

    def forms(self) -> Mapping[str, Form]:
        return {name: self._form(name) for name in self._file}

    def read(self, name: str, row: int | None = None) -> np.ndarray:
        path, file = self._file[name]
        form = self._form(name)
        try:
            found = file.get_tensor(name) if row is None else file.get_slice(name)[row]
        except (AttributeError, TypeError, safetensors.SafetensorError) as error:
            raise UserError(
                f'{path}: {name} is of type {form.dtype}, which is not read: save it in float32'
            ) from error
        return found.reshape(form.shape if row is None else form.shape[1:])

    def _form(self, name: str) -> Form:
        path, file = self._file[name]
        piece = file.get_slice(name)
        if piece.get_dtype() not in DTYPES:
            raise UserError(f'{path}: {name} is of type {piece.get_dtype()}, which is not read')
        return Form(tuple(piece.get_shape()), DTYPES[piece.get_dtype()])


def open_file(path: Path) -> safetensors.safe_open:
    """A safetensors file; UserError where it is missing or damaged."""
    try:
        return safetensors.safe_open(path, framework='np')
    except FileNotFoundError as error:
        flaw = 'may not be read: allow it' if path.is_file() else 'there is no such file'
        raise UserError(f'{path}: {flaw}') from error
    except OSError as error:
        raise UserError(f'{path}: cannot be read ({error})') from error
    except safetensors.SafetensorError as error:
        raise UserError(f'{path}: the file is damaged or was cut short ({error})') from error


def write(path: Path, flat: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
    """Writes arrays, `Streamed` or whole, to a safetensors file that is replaced atomically.

    Only one part is in memory at a time. Raises ValueError where parts do not make up their array.
    """
    # Wide types come first, so that every array begins at a multiple of its own width.
    names = sorted(flat, key=lambda name: (-flat[name].dtype.itemsize, name))
    header, end = {'__metadata__': dict(metadata)} if metadata else {}, 0
    for name in names:
        leaf = flat[name]
        begin, end = end, end + leaf.nbytes
        kind = NAMES[leaf.dtype.name]
        header[name] = {'dtype': kind, 'shape': list(leaf.shape), 'data_offsets': [begin, end]}
    text = json.dumps(header).encode()
    text += b' ' * (-len(text) % ALIGNMENT)
    with files.replacing(path) as temporary:
        with temporary.open('wb') as file:
            file.write(len(text).to_bytes(8, 'little') + text)
            for name in names:
                _write_array(file, name, flat[name])
        temporary.chmod(0o644)


def _write_array(file: Any, name: str, leaf: Any) -> None:
    written = 0
    for part in _parts(leaf):
        whole = np.asarray(part, order='C')
        if whole.dtype != leaf.dtype:
            raise ValueError(f'{name} of {leaf.dtype} has a part of {whole.dtype}')
        file.write(whole.reshape(-1).view(np.uint8))
        written += whole.nbytes
    if written != leaf.nbytes:
        raise ValueError(f'the parts of {name} have {written} bytes, its shape {leaf.nbytes}')


def _parts(leaf: Any) -> Iterator[np.ndarray]:
    if isinstance(leaf, Streamed):
        yield from leaf.parts()
    else:
        yield jax.device_get(leaf)
