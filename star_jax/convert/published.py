"""Which state dicts does a published file contain?

A file is safetensors, or `.pth`, which torch reads without executing anything. It holds the nested
dict of a STAR trainer, or the flat state dict of a VAR, a STAR or a tokenizer (STAR specification
10).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from star_jax.checkpoint.stored import StoredTensors, Tensors, TensorSpec
from star_jax.errors import UserError

SUFFIXES = ('.pth', '.pt', '.bin', '.safetensors')
TRAINER = 'trainer'
TRANSFORMER, TOKENIZER = 'var_wo_ddp', 'vae_local'  # parts of a STAR trainer
TOKENIZER_TENSOR = 'quantize.embedding.weight'  # identifies the state dict of a tokenizer
TRANSFORMER_TENSOR = 'word_embed.weight'  # identifies the state dict of a transformer
ZIP, PICKLE, TAR = b'PK\x03\x04', b'\x80', b'ustar'  # signatures of torch files, newest first
TAR_OFFSET = 257  # of the tar signature, in bytes


class TorchTensors:
    """The tensors of a state dict that torch maps into memory (`stored.Tensors`)."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        self._tensors = tensors

    def specs(self) -> Mapping[str, TensorSpec]:
        return {
            name: TensorSpec(tuple(x.shape), jnp.dtype(_type_name(x)))
            for name, x in self._tensors.items()
        }

    def read(self, name: str, row: int | None = None) -> np.ndarray:
        tensor = self._tensors[name] if row is None else self._tensors[name][row]
        if _type_name(tensor) == 'bfloat16':  # numpy has no bfloat16
            return tensor.view(dtype=_torch().int16).numpy().view(jnp.bfloat16)
        return tensor.numpy()


def read(path: Path) -> dict[str, Tensors]:
    """Reads the state dicts of a file.

    Returns:
        The tensors under 'transformer', 'tokenizer', or both.

    Raises:
        UserError: the file is missing, damaged or of another layout, contains more than tensors
            and plain data, or needs torch, which is not installed.
    """
    if path.suffix == '.safetensors':
        return _classify(StoredTensors([path]), path)
    content = _load_torch(path)
    if not isinstance(content, Mapping):
        raise _layout_error(path, f'it holds a {type(content).__name__}')
    if TRAINER not in content:
        return _classify(TorchTensors(_tensors(content, path)), path)
    trainer = content[TRAINER]
    if not isinstance(trainer, Mapping) or TRANSFORMER not in trainer:
        raise _layout_error(path, f'its {TRAINER!r} has no {TRANSFORMER!r}')
    parts = {'transformer': TorchTensors(_tensors(trainer[TRANSFORMER], path))}
    if trainer.get(TOKENIZER):
        parts['tokenizer'] = TorchTensors(_tensors(trainer[TOKENIZER], path))
    return parts


def _classify(tensors: Tensors, path: Path) -> dict[str, Tensors]:
    """A flat state dict under the name of its part."""
    names = tensors.specs()
    if TOKENIZER_TENSOR in names:
        return {'tokenizer': tensors}
    if TRANSFORMER_TENSOR in names:
        return {'transformer': tensors}
    raise _layout_error(path, f'it has neither {TRANSFORMER_TENSOR} nor {TOKENIZER_TENSOR}')


def _layout_error(path: Path, flaw: str) -> UserError:
    return UserError(
        f'{path} is no published STAR, VAR or tokenizer file: {flaw}; expected the dict of a STAR '
        f'trainer, or the state dict of a transformer or of a tokenizer'
    )


def _tensors(content: Any, path: Path) -> Mapping[str, Any]:
    if not isinstance(content, Mapping):
        raise _layout_error(path, f'instead of a state dict it has a {type(content).__name__}')
    others = [name for name, value in content.items() if not hasattr(value, 'numpy')]
    if others:
        raise _layout_error(path, f'{others[0]!r} is no tensor')
    return content


def _load_torch(path: Path) -> Any:
    """The content of a torch file, mapped into memory if its format allows that."""
    if not path.is_file():
        raise UserError(f'{path}: there is no such file')
    _check_signature(path)
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
        except Exception as error:  # pickle.UnpicklingError, without importing pickle
            raise UserError(
                f'{path} holds more than tensors and plain data, which could execute code, so it '
                'is not opened: save its state dict as safetensors'
            ) from error
    raise AssertionError


def _check_signature(path: Path) -> None:
    """Raises UserError for a file that torch did not write, such as a failed download."""
    try:
        with path.open('rb') as file:
            head = file.read(TAR_OFFSET + len(TAR))
    except OSError as error:
        raise UserError(f'{path}: cannot be read ({error.strerror})') from error
    if not (head.startswith((ZIP, PICKLE)) or head[TAR_OFFSET:] == TAR):
        raise UserError(
            f'{path} is no file of torch, or the download failed (a git-lfs pointer, a web page): '
            'fetch it again'
        )


def _torch() -> Any:
    try:
        import torch  # an optional extra, and slow to import
    except ImportError as error:
        raise UserError(
            'reading a .pth file needs torch: run `pip install torch`, or save the state dict of '
            'the file as safetensors on another machine'
        ) from error
    return torch


def _type_name(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix('torch.')
