"""How is a file of torch read without executing anything in it, and how is one written?

Only `torch.load(weights_only=True)` opens it. Training scripts save more than tensors: paths,
command lines, numbers of numpy, configs. Objects of the classes in `HARMLESS` are read as empty
stand-ins, which execute nothing; a file with any other class is refused.
"""

import collections
import math
import mmap
import re
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

from star_jax import files
from star_jax.checkpoint.stored import TensorSpec, append, check_names
from star_jax.errors import UserError

ZIP, PICKLE, TAR = b'PK\x03\x04', b'\x80', b'ustar'  # signatures of torch files, newest first
TAR_OFFSET = 257  # position of the tar signature, in bytes
HEAD = TAR_OFFSET + len(TAR)  # bytes that contain the signature
BITS = {1: 'uint8', 2: 'int16'}  # torch's type of equal width, for floats that numpy lacks
BLOCK = 2**22  # bytes that are read at a time
SHOWN = 8  # classes in one message
ALIGNMENT = 64  # bytes; mapped arrays start at multiples

LISTS = re.compile(r'collections\.deque')
DICTS = re.compile(
    r'collections\.defaultdict|easydict\.EasyDict|addict\.addict\.Dict|munch\.Munch'
    r'|yacs\.config\.CfgNode|(pytorch_lightning|lightning)(\.\w+)*\.AttributeDict'
    r'|lightning_(fabric|utilities)(\.\w+)*\.AttributeDict'
)
HARMLESS = re.compile(
    r'argparse\.Namespace|builtins\.Ellipsis|functools\.partial|types\.SimpleNamespace|pathlib(\._local)?\.(Pure)?(Posix|Windows)?Path'
    r'|builtins\.(bool|dict|float|frozenset|int|list|object|range|slice|str|tuple)|typing\.Any'
    r'|datetime\.(date|datetime|time|timedelta|timezone)|decimal\.Decimal|fractions\.Fraction'
    r'|uuid\.(UUID|SafeUUID)|numpy\.(dtype|ndarray|dtypes\.\w+DType)'
    r'|numpy\._?core\.(multiarray\.(scalar|_reconstruct)|numeric\._frombuffer)'
    r'|numpy\.random\._\w+\.\w+|omegaconf\.(base|dictconfig|listconfig|nodes|omegaconf)\.\w+'
    r'|ml_collections(\.\w+)*\.(Frozen)?ConfigDict|(pytorch_)?lightning(_\w+)?(\.\w+)+'
)


class _StandIn:
    """Stands for an object beside the tensors, and holds nothing of it."""

    def __new__(cls, *_: object) -> Any:
        return object.__new__(cls)

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


class _DictStandIn:
    """Stands for the class of a dict, whose items are read."""

    def __new__(cls, *_: object) -> Any:
        return collections.OrderedDict()


class _ListStandIn:
    """Stands for the class of a list, whose items are read."""

    def __new__(cls, *_: object) -> Any:
        return []


STAND_INS = {LISTS: _ListStandIn, DICTS: _DictStandIn, HARMLESS: _StandIn}
REFUSED = re.compile(r'GLOBAL (\S+) was not an allowed')  # in torch's error for the first one


class TorchTensors:
    """The tensors of a state dict that torch maps into memory (`stored.Tensors`)."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        self._tensors = tensors

    @classmethod
    def merged(cls, parts: Iterable[tuple[Path, 'TorchTensors']]) -> 'TorchTensors':
        """The tensors of several files; UserError if two files have one of the same name."""
        tensors = {}
        for path, part in parts:
            check_names(path, tensors.keys() & part._tensors.keys())
            tensors |= part._tensors
        return cls(tensors)

    def specs(self) -> Mapping[str, TensorSpec]:
        return {
            name: TensorSpec(tuple(x.shape), _dtype(name, x)) for name, x in self._tensors.items()
        }

    def read(self, name: str, row: int | None = None) -> np.ndarray:
        tensor = self._tensors[name]
        dtype = _dtype(name, tensor)
        if getattr(tensor, 'requires_grad', False):
            tensor = tensor.detach()
        if row is not None:
            tensor = tensor[row]
        try:
            if dtype.isbuiltin == 1:
                return tensor.numpy()
            bits = getattr(_torch(), BITS[dtype.itemsize])
            return tensor.view(dtype=bits).numpy().view(dtype)
        except (RuntimeError, TypeError) as error:  # such as a view of conjugated numbers
            reason = str(error).partition('\n')[0]
            raise UserError(
                f'{name} cannot be read ({reason}): save its clone, in float32'
            ) from error

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def renamed(self, names: Mapping[str, str]) -> 'TorchTensors':
        """The tensors of `names`, which maps new names to those here."""
        return TorchTensors({new: self._tensors[name] for new, name in names.items()})


def is_tensor(value: object) -> bool:
    try:
        return all(hasattr(value, name) for name in ('numpy', 'dtype', 'shape'))
    except RuntimeError:  # a tensor of tensors, which has no shape
        return False


def is_torch(head: bytes) -> bool:
    """Whether the first `HEAD` bytes of a file are those of a file of torch."""
    return head.startswith((ZIP, PICKLE)) or head[TAR_OFFSET:HEAD] == TAR


def load(path: Path) -> Any:
    """The content of a torch file, mapped into memory if its format allows that.

    Raises:
        UserError: the file is damaged or holds a class that is not known to be harmless, or torch
            is not installed.
    """
    torch, stand_ins = _torch(), {}
    _check_zip(path)
    while True:
        try:
            return _load(torch, path, stand_ins)
        except UserError:
            raise
        except Exception as error:  # pickle.UnpicklingError, without importing pickle
            found = {name: _stand_in(name) for name in _other_classes(torch, path, error)}
            dangerous = [name for name, part in found.items() if part is None]
            if dangerous or found.keys() <= stand_ins.keys():
                raise _refusal(path, dangerous) from error
            stand_ins |= found


def _check_zip(path: Path) -> None:
    """Raises UserError for a zip file whose members differ from their checksums.

    torch does not compare them where it maps a file into memory. A file that was written without
    checksums differs in every member.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = [member for member in archive.infolist() if member.file_size]
            damaged = [member.filename for member in members if not _is_intact(archive, member)]
    except (zipfile.BadZipFile, zlib.error, OSError, RuntimeError, EOFError, ValueError):
        return  # torch reports what it cannot read
    if 0 < len(damaged) < len(members):
        raise UserError(
            f'{path}: the file is damaged ({damaged[0]} differs from its checksum): fetch it again'
        )


def _is_intact(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bool:
    try:
        with archive.open(member) as file:
            while file.read(BLOCK):
                pass
    except zipfile.BadZipFile:
        return False
    return True


def _load(torch: Any, path: Path, stand_ins: Mapping[str, type]) -> Any:
    if not stand_ins:
        return _load_plain(torch, path)
    with torch.serialization.safe_globals([(part, name) for name, part in stand_ins.items()]):
        return _load_plain(torch, path)


def _load_plain(torch: Any, path: Path) -> Any:
    for mapped in (True, False):
        try:
            return torch.load(path, map_location='cpu', weights_only=True, mmap=mapped)
        except (RuntimeError, ValueError, EOFError, OSError) as error:
            if not mapped:
                reason = str(error).partition('\n')[0]
                if 'TorchScript' in reason:
                    raise UserError(
                        f'{path} is a program of TorchScript: save the state dict of its model'
                    ) from error
                raise UserError(
                    f'{path}: the file is damaged or was cut short ({reason})'
                ) from error
    raise AssertionError


def _other_classes(torch: Any, path: Path, error: Exception) -> list[str]:
    """The classes in a file beside those that torch reads itself; at least the first of them."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # an old format, whose classes torch cannot list
        names = REFUSED.findall(str(error))
        return [name if '.' in name else f'builtins.{name}' for name in names]


def _stand_in(name: str) -> type | None:
    return next((part for known, part in STAND_INS.items() if known.fullmatch(name)), None)


def _refusal(path: Path, classes: list[str]) -> UserError:
    more = f' and {len(classes) - SHOWN} more' if len(classes) > SHOWN else ''
    if not classes:
        return UserError(
            f'{path} is not read by the safe loader of torch: save its state dict as safetensors, '
            'or with torch.save and its own pickle protocol, 2'
        )
    listed = ', '.join(classes[:SHOWN]) + more
    return UserError(
        f'{path} holds more than tensors and plain data ({listed}), which '
        'could execute code, so it is not opened: save its state dict as safetensors'
    )


def _dtype(name: str, tensor: Any) -> np.dtype:
    kind = str(tensor.dtype).removeprefix('torch.')
    layout = str(getattr(tensor, 'layout', 'torch.strided')).removeprefix('torch.')
    if layout != 'strided':
        raise UserError(f'{name} is a tensor of layout {layout}, which is not supported')
    if getattr(tensor, 'is_meta', False):
        raise UserError(f'{name} has no values: it was saved from the device meta')
    try:
        return jnp.dtype(kind)
    except TypeError as error:
        raise UserError(
            f'{name} has type {kind}, which is not supported: save it in float32'
        ) from error


def check_available() -> None:
    """Raises UserError if torch is not installed."""
    _torch()


def save(path: Path, state: Mapping[str, Any], place: Sequence[str]) -> None:
    """Writes a file of torch, which is replaced atomically.

    The tensors pass through a nameless file beside it that is mapped into memory, so that a model
    larger than memory can be written; it needs twice its size on the disk.

    Args:
        path: the file.
        state: arrays, or `stored.StreamedArray`s, by name.
        place: the keys of the dicts around the state dict, the outermost first.

    Raises:
        UserError: torch is missing or refuses to write.
        OSError: a file cannot be written.
    """
    torch = _torch()
    with tempfile.TemporaryFile(dir=path.parent) as file:
        content: Any = _mapped(torch, file, state)
        for key in reversed(place):
            content = {key: content}
        with files.replacing(path) as temporary:
            try:
                with temporary.open('wb') as target:
                    torch.save(content, target)
            except RuntimeError as error:
                reason = str(error).partition('\n')[0]
                raise UserError(f'{path}: torch does not write it ({reason})') from error
            temporary.chmod(0o644)


def _mapped(torch: Any, file: BinaryIO, state: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays as tensors of torch whose values lie in a file."""
    starts = {}
    for name, leaf in state.items():
        file.write(bytes(-file.tell() % ALIGNMENT))
        starts[name] = file.tell()
        append(file, name, leaf)
    file.write(bytes(ALIGNMENT))  # an empty file cannot be mapped
    file.flush()
    content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # torch wants it writable
    tensors = {}
    for name, leaf in state.items():
        dtype, count = getattr(torch, leaf.dtype.name), math.prod(leaf.shape)
        if count:
            flat = torch.frombuffer(content, dtype=dtype, count=count, offset=starts[name])
            tensors[name] = flat.reshape(leaf.shape)
        else:
            tensors[name] = torch.empty(leaf.shape, dtype=dtype)
    return tensors


def _torch() -> Any:
    try:
        import torch  # an optional extra, and slow to import
    except ImportError as error:
        raise UserError(
            'reading or writing a .pth file needs torch: run `pip install torch`, or use '
            'safetensors, as which any machine with torch can save a state dict'
        ) from error
    return torch
