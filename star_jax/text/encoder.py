"""What does a caption say to the image model?

`load` reads a pretrained encoder; a `TextEncoder` turns captions into `Text`: token states, mask
and a pooled vector. Its weights are frozen, so it is a value: `apply` is pure and may be traced
inside a training program, `encode` is for captions at hand.
"""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from star_jax.core.condition import Text
from star_jax.errors import UserError
from star_jax.text import bert
from star_jax.text.folder import DEFAULT, Folder, Tensors, full_name, locate
from star_jax.text.tokens import Split, Tokens, pad, read

# Captions per compiled call. One number for all calls, so that a caption's features do not depend
# on how many others were encoded beside it; large enough for a processor, small for one prompt.
ROWS = 16
# Compiled lengths are multiples of this: most captions are far shorter than the longest allowed.
STRIDE = 8
# Raised when an encoder computes other numbers from the same files: cached features expire.
REVISION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """What one `model_type` of config.json stands for.

    `build(config)`: a Linen module with `width`, `vocab`, `longest` (or None) and
    `module(tokens) -> states_BTE, pooled_BE`, which must not read tokens where the mask is 0.
    `convert(module, tensors)`: its parameters from the folder's tensors.
    `length`: tokens per caption unless asked otherwise.
    """

    build: Callable[[Mapping], nn.Module]
    convert: Callable[[nn.Module, Tensors], dict]
    length: int


ARCHITECTURES = {'bert': Architecture(build=bert.build, convert=bert.convert, length=32)}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TextEncoder:
    """A frozen text encoder.

    `length`: T, tokens per caption. `width`: E. `params`: host arrays, float32; place them on a
    mesh with the shardings of `abstract_params()`.
    """

    source: str
    length: int
    width: int
    params: dict
    module: nn.Module
    folder: Folder
    split: Split

    @functools.cached_property
    def sha256(self) -> str:
        """Hex digest of the folder's config, weights and tokenizer."""
        return self.folder.sha256()

    @functools.cached_property
    def identity(self) -> str:
        """Hex digest of all that decides the features of a caption; caches are keyed by it."""
        return hashlib.sha256(f'{REVISION} {self.length} {self.sha256}'.encode()).hexdigest()

    def reference(self) -> dict[str, str]:
        """How a model folder's config.json names this encoder: `load(**reference)` checks it."""
        return {'source': self.source, 'sha256': self.sha256}

    def abstract_params(self) -> dict:
        """Shapes of `params`, boxed with their logical axes."""
        tokens = pad([], 1, STRIDE, 0)
        return jax.eval_shape(self.module.init, jax.random.key(0), tokens)['params']

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        """Captions as (B, T) numpy int32, truncated and padded to `length`."""
        return pad(self.split(captions), len(captions), self.length, self._filler)

    def apply(self, params: dict, tokens: Tokens) -> Text:
        """Pure: features of tokens (B, any T <= `length`), float32, states zero at padding."""
        states_BTE, pooled_BE = self.module.apply({'params': params}, tokens)
        real_BT1 = tokens.mask_BT[:, :, None] > 0
        return Text(
            states_BTE=jnp.where(real_BT1, states_BTE, 0).astype(jnp.float32),
            mask_BT=tokens.mask_BT,
            pooled_BE=pooled_BE.astype(jnp.float32),
        )

    def encode(self, captions: Sequence[str]) -> Text:
        """Features of any number of captions as numpy arrays, padded to `length`.

        Each distinct caption is encoded once, in batches of one size and of captions of like
        length; the result is that of `apply` on `tokenize`, to rounding.
        """
        unique = {caption: row for row, caption in enumerate(dict.fromkeys(captions))}
        ids = self.split(list(unique))
        calls = [
            (rows, self._run(self._placed, pad([ids[row] for row in rows], ROWS, T, self._filler)))
            for rows, T in _batches([len(one) for one in ids], self.length)
        ]
        states_NTE = np.zeros((len(unique), self.length, self.width), np.float32)
        mask_NT = np.zeros((len(unique), self.length), np.int32)
        pooled_NE = np.zeros((len(unique), self.width), np.float32)
        for rows, text in calls:
            T = text.mask_BT.shape[1]
            states_NTE[rows, :T] = np.asarray(text.states_BTE)[: len(rows)]
            mask_NT[rows, :T] = np.asarray(text.mask_BT)[: len(rows)]
            pooled_NE[rows] = np.asarray(text.pooled_BE)[: len(rows)]
        back = np.array([unique[caption] for caption in captions], int)
        return Text(states_BTE=states_NTE[back], mask_BT=mask_NT[back], pooled_BE=pooled_NE[back])

    @property
    def _filler(self) -> int:
        return self.folder.config.get('pad_token_id') or 0

    @functools.cached_property
    def _run(self) -> Callable[[dict, Tokens], Text]:
        return jax.jit(self.apply)

    @functools.cached_property
    def _placed(self) -> dict:
        return jax.device_put(self.params)


def load(
    source: str = DEFAULT, length: int | None = None, sha256: str | None = None
) -> TextEncoder:
    """The encoder that a source names: 'package:NAME', a folder, or a hub id.

    `length`: tokens per caption, by default the architecture's own. `sha256`: what the files must
    be, as `TextEncoder.reference` recorded it. Raises `UserError` when the encoder cannot be had,
    is of an unknown architecture, or is another one than recorded.
    """
    folder = locate(source)
    model_type = folder.config.get('model_type')
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise UserError(
            f'{source} is a text encoder of model_type {model_type!r}; supported: '
            f'{", ".join(sorted(ARCHITECTURES))}.'
        )
    architecture = ARCHITECTURES[model_type]
    module = architecture.build(folder.config)
    length = architecture.length if length is None else length
    _check_length(length, module.longest)
    split, largest_id = read(folder, length)
    encoder = TextEncoder(
        source=full_name(source),
        length=length,
        width=module.width,
        params=_convert(architecture, module, folder),
        module=module,
        folder=folder,
        split=split,
    )
    if sha256 is not None and sha256 != encoder.sha256:
        raise UserError(
            f'The model was trained with the text encoder of sha256 {sha256}, but {source} has '
            f'{encoder.sha256}; name the folder of the encoder that it was trained with.'
        )
    _check_shapes(encoder)
    _check_vocabulary(encoder, largest_id)
    return encoder


def _batches(lengths: Sequence[int], longest: int) -> Iterator[tuple[list[int], int]]:
    """Which captions share a call (at most ROWS of one padded length), and that length."""

    def padded(row: int) -> int:
        return min(-(-lengths[row] // STRIDE) * STRIDE, longest)

    for T, group in itertools.groupby(sorted(range(len(lengths)), key=padded), padded):
        rows = list(group)
        for first in range(0, len(rows), ROWS):
            yield rows[first : first + ROWS], T


def _convert(architecture: Architecture, module: nn.Module, folder: Folder) -> dict:
    try:
        return architecture.convert(module, folder.tensors())
    except KeyError as error:
        raise UserError(
            f'{folder.path} has no tensor {error}, which its config.json asks for; fetch the '
            f'whole model again.'
        ) from error
    except ValueError as error:
        raise UserError(
            f'{folder.path}: a tensor has not the shape that its config.json asks for ({error}); '
            f'weights and config do not belong together.'
        ) from error


def _check_length(length: int, longest: int | None) -> None:
    if length < STRIDE or (longest is not None and length > longest):
        limit = 'or more' if longest is None else f'to {longest}'
        raise UserError(f'The text length is {length}; this encoder takes {STRIDE} {limit} tokens.')


def _check_shapes(encoder: TextEncoder) -> None:
    expected = dict(jax.tree.leaves_with_path(nn.unbox(encoder.abstract_params())))
    for path, array in jax.tree.leaves_with_path(encoder.params):
        if array.shape != expected[path].shape:
            raise UserError(
                f'{encoder.source}: {jax.tree_util.keystr(path)} has shape {array.shape}, but its '
                f'config.json asks for {expected[path].shape}; weights and config do not belong '
                f'together.'
            )


def _check_vocabulary(encoder: TextEncoder, largest_id: int) -> None:
    """Raises UserError for a tokenizer of more words than the model: JAX would clamp their ids."""
    filler = encoder.folder.config.get('pad_token_id')
    if filler is not None and (type(filler) is not int or not 0 <= filler < encoder.module.vocab):
        raise UserError(
            f'{encoder.source}: pad_token_id is {filler!r}, expected a token id below '
            f'{encoder.module.vocab}.'
        )
    if largest_id >= encoder.module.vocab:
        raise UserError(
            f'{encoder.source}: its tokenizer gives ids up to {largest_id}, but its model has '
            f'{encoder.module.vocab} words; tokenizer and weights do not belong together.'
        )
