"""What is in a published file?

A `.pth` file, read by torch without running anything in it, or safetensors: the nested dict of a
STAR trainer, or a flat state dict of a VAR, a STAR or a tokenizer (STAR specification 10).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from star_jax.checkpoint.stored import Form, Stored, Tensors
from star_jax.errors import UserError

SUFFIXES = ('.pth', '.pt', '.bin', '.safetensors')
TRAINER = 'trainer'
TRANSFORMER, TOKENIZER = 'var_wo_ddp', 'vae_local'  # parts of a STAR trainer
OF_TOKENIZER = 'quantize.embedding.weight'  # tells a tokenizer's state dict from a transformer's
OF_TRANSFORMER = 'word_embed.weight'
ZIP, PICKLE, TAR = b'PK\x03\x04', b'\x80', b'ustar'  # how torch's files begin, by their age
TAR_AT = 257  # bytes; where the last one stands


class Loaded:
    """The tensors of a state dict that torch has mapped into memory."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        self._tensors = tensors

    def forms(self) -> Mapping[str, Form]:
        return {
            name: Form(tuple(x.shape), jnp.dtype(_type_name(x)))
            for name, x in self._tensors.items()
        }

    def read(self, name: str, row: int | None = None) -> np.ndarray:
        tensor = self._tensors[name] if row is None else self._tensors[name][row]
        if _type_name(tensor) == 'bfloat16':  # which numpy itself does not have
            return tensor.view(dtype=_torch().int16).numpy().view(jnp.bfloat16)
        return tensor.numpy()


def read(path: Path) -> dict[str, Tensors]:
    """The state dicts in a file: of a 'transformer', of a 'tokenizer', or both.

    Raises UserError for what is missing, damaged or of another layout, for a file that holds
    anything but tensors and plain data, and where torch is needed and not installed.
    """
    if path.suffix == '.safetensors':
        return _sort(Stored([path]), path)
    content = _unpickled(path)
    if not isinstance(content, Mapping):
        raise _strange(path, f'it holds a {type(content).__name__}')
    if TRAINER not in content:
        return _sort(Loaded(_tensors(content, path)), path)
    trainer = content[TRAINER]
    if not isinstance(trainer, Mapping) or TRANSFORMER not in trainer:
        raise _strange(path, f'its {TRAINER!r} has no {TRANSFORMER!r}')
    found = {'transformer': Loaded(_tensors(trainer[TRANSFORMER], path))}
    if trainer.get(TOKENIZER):
        found['tokenizer'] = Loaded(_tensors(trainer[TOKENIZER], path))
    return found


def _sort(tensors: Tensors, path: Path) -> dict[str, Tensors]:
    """A flat state dict, as what it is."""
    names = tensors.forms()
    if OF_TOKENIZER in names:
        return {'tokenizer': tensors}
    if OF_TRANSFORMER in names:
        return {'transformer': tensors}
    raise _strange(path, f'it has neither {OF_TRANSFORMER} nor {OF_TOKENIZER}')


def _strange(path: Path, what: str) -> UserError:
    return UserError(
        f'{path} is no published STAR, VAR or tokenizer file: {what}; expected the dict of a STAR '
        f'trainer, or the state dict of a transformer or of a tokenizer'
    )


def _tensors(content: Any, path: Path) -> Mapping[str, Any]:
    if not isinstance(content, Mapping):
        raise _strange(path, f'in place of a state dict it has a {type(content).__name__}')
    strange = [name for name, value in content.items() if not hasattr(value, 'numpy')]
    if strange:
        raise _strange(path, f'{strange[0]!r} is no tensor')
    return content


def _unpickled(path: Path) -> Any:
    """What torch finds in a file, mapped where its format allows that."""
    if not path.is_file():
        raise UserError(f'{path}: there is no such file')
    _check_begin(path)
    torch = _torch()
    for mapped in (True, False):
        try:
            return torch.load(path, map_location='cpu', weights_only=True, mmap=mapped)
        except (RuntimeError, ValueError, EOFError, OSError) as error:
            if not mapped:
                reason = str(error).partition('\n')[0]
                raise UserError(
                    f'{path}: the file is damaged or was cut short ({reason})'
                ) from error
        except Exception as error:  # what pickle raises: it is not imported to name it
            raise UserError(
                f'{path} holds more than tensors and plain data, which may run code, and is not '
                'opened: save its state dict as safetensors'
            ) from error
    raise AssertionError


def _check_begin(path: Path) -> None:
    """Raises UserError for what torch has never written, such as the page of a failed download."""
    try:
        with path.open('rb') as file:
            begin = file.read(TAR_AT + len(TAR))
    except OSError as error:
        raise UserError(f'{path}: cannot be read ({error.strerror})') from error
    if not (begin.startswith((ZIP, PICKLE)) or begin[TAR_AT:] == TAR):
        raise UserError(
            f'{path} is no file of torch, or was fetched only in part (a pointer of git-lfs, a web '
            'page): fetch it again'
        )


def _torch() -> Any:
    try:
        import torch  # an optional extra, and slow to import
    except ImportError as error:
        raise UserError(
            'reading a .pth file needs torch: run `pip install torch`, or save the state dict of '
            'the file as safetensors elsewhere'
        ) from error
    return torch


def _type_name(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix('torch.')
