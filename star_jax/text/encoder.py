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
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from star_jax.core.condition import TextCondition
from star_jax.errors import UserError
from star_jax.parallel import rules
from star_jax.text import bert, clip, t5
from star_jax.text.folder import DEFAULT, Folder, full_name, locate
from star_jax.text.pooling import Pool
from star_jax.text.tokens import Split, Tokens, pad, read
from star_jax.text.tower import Tower
from star_jax.text.weights import Weights

# Captions per compiled call. One number for all calls, so that a caption's features do not depend
# on how many others were encoded beside it; large enough for a processor, small for one prompt.
ROWS = 16
# Compiled lengths are multiples of this: most captions are far shorter than the longest allowed.
STRIDE = 8
# Raised when an encoder computes other numbers from the same files: cached features expire.
REVISION = 1
DTYPE = 'float32'
DTYPES = (DTYPE, 'bfloat16')


# What each `model_type` of a config.json stands for.
TOWERS: dict[str, Callable[[Mapping], Tower]] = {
    'bert': bert.tower,
    'clip': clip.tower,
    'clip_text_model': clip.tower,
    't5': t5.tower,
}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TextEncoder:
    """A frozen text encoder.

    `length`: T, tokens per caption. `dtype`: of parameters and activations. `mesh`: where the
    parameters lie, split as their logical axes say; None: on one device. `pool`: what makes one
    vector of the states.
    """

    field = 'caption'  # of an example, which prompts a model

    source: str
    length: int
    dtype: str
    mesh: Mesh | None
    pool: Pool
    tower: Tower
    folder: Folder
    split: Split

    @property
    def width(self) -> int:
        """E, of token states and pooled vector."""
        return self.tower.width

    @functools.cached_property
    def params(self) -> dict:
        """The parameters on the devices, read tensor by tensor when first asked for."""
        return self.weights.read(self.dtype, self.mesh)

    @functools.cached_property
    def sha256(self) -> str:
        """Hex digest of the folder's config, weights and tokenizer."""
        return self.folder.sha256()

    @functools.cached_property
    def identity(self) -> str:
        """Hex digest of all that decides the features of a caption; caches are keyed by it."""
        parts = [REVISION, self.length, self.sha256]
        # What is usual is left out, so that older caches stay valid.
        parts += [self.dtype] if self.dtype != DTYPE else []
        parts += [self.pool] if self.pool != self.tower.pool else []
        return hashlib.sha256(' '.join(map(str, parts)).encode()).hexdigest()

    def reference(self) -> dict[str, str]:
        """How a model folder's config.json names this encoder: `load(**reference)` checks it."""
        return {'source': self.source, 'sha256': self.sha256}

    def abstract_params(self) -> dict:
        """Shapes of `params`, boxed with their logical axes."""
        tokens = pad([], 1, STRIDE, 0)
        return jax.eval_shape(self.tower.module.init, jax.random.key(0), tokens)['params']

    def abstract_tokens(self, rows: int) -> Tokens:
        """Shapes of the tokens of so many captions."""
        ids_BT = jax.ShapeDtypeStruct((rows, self.length), jnp.int32)
        return Tokens(ids_BT=ids_BT, mask_BT=ids_BT)

    @functools.cached_property
    def weights(self) -> Weights:
        """What the parameters are made of."""
        pieces = self.tower.pieces(self.folder.tensors())
        return Weights(folder=self.folder, pieces=tuple(pieces), boxed=self.abstract_params())

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        """Captions as (B, T) numpy int32, truncated and padded to `length`."""
        return pad(self.split(captions), len(captions), self.length, self.tower.filler)

    def apply(self, params: dict, tokens: Tokens) -> TextCondition:
        """Pure: features of tokens (B, T), float32, states zero at padding.

        T is `length`, or any smaller number where the pool does not read padding.
        """
        return read_states(self.tower, self.pool, params, tokens)

    def encode(self, captions: Sequence[str]) -> TextCondition:
        """Features of any number of captions as numpy arrays, padded to `length`.

        Each distinct caption is encoded once, in batches of one size and of captions of like
        length; the result is that of `apply` on `tokenize`, to rounding.
        """
        unique = {caption: row for row, caption in enumerate(dict.fromkeys(captions))}
        ids = self.split(list(unique))
        stride = self.length if self.pool.padding else STRIDE
        calls = [
            (rows, self._run(self.params, self._padded([ids[row] for row in rows], T)))
            for rows, T in _batches([len(one) for one in ids], self.length, stride)
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
        return TextCondition(
            states_BTE=states_NTE[back], mask_BT=mask_NT[back], pooled_BE=pooled_NE[back]
        )

    def _padded(self, ids: Sequence[Sequence[int]], length: int) -> Tokens:
        return pad(ids, ROWS, length, self.tower.filler)

    @functools.cached_property
    def _run(self) -> Callable[[dict, Tokens], TextCondition]:
        return jax.jit(self.apply, out_shardings=rules.replicated(self.mesh) if self.mesh else None)


def load(
    source: str = DEFAULT,
    length: int | None = None,
    sha256: str | None = None,
    *,
    dtype: str = DTYPE,
    mesh: Mesh | None = None,
    pool: Pool | None = None,
) -> TextEncoder:
    """The encoder that a source names: 'package:NAME', a folder, or a hub id.

    `length`: tokens per caption, by default the architecture's own. `sha256`: what the files must
    be, as `TextEncoder.reference` recorded it. `dtype`: float32 or bfloat16, of parameters and
    activations. `mesh`: devices that share the parameters, all of whose processes must encode the
    same captions. `pool`: another one than the architecture's own. Raises `UserError` when the
    encoder cannot be had, is of an unknown architecture, or is another one than recorded.
    """
    folder = locate(source)
    tower = _tower(source, folder.config)
    if dtype not in DTYPES:
        raise UserError(
            f'the dtype of a text encoder is {dtype!r}; supported: {", ".join(DTYPES)}.'
        )
    length = tower.length if length is None else length
    _check_length(length, tower.longest)
    split, largest_id = read(folder, length)
    encoder = TextEncoder(
        source=full_name(source),
        length=length,
        dtype=dtype,
        mesh=mesh,
        pool=tower.pool if pool is None else pool,
        tower=tower,
        folder=folder,
        split=split,
    )
    encoder.weights.check()  # first: of a torn file, the digest says less
    if sha256 is not None and sha256 != encoder.sha256:
        raise UserError(
            f'The model was trained with the text encoder of sha256 {sha256}, but {source} has '
            f'{encoder.sha256}; name the folder of the encoder that it was trained with.'
        )
    _check_vocabulary(source, tower, largest_id)
    return encoder


def read_states(tower: Tower, pool: Pool, params: dict, tokens: Tokens) -> TextCondition:
    """Pure: features of tokens (B, T), float32, states zero at padding."""
    # A tower is frozen and its features are cached: a rounding of the accelerator's cheaper
    # float32 products would be paid in every later run.
    with jax.default_matmul_precision('highest'):
        states_BTE = tower.module.apply({'params': params}, tokens)
    real_BT1 = tokens.mask_BT[:, :, None] > 0
    return TextCondition(
        states_BTE=jnp.where(real_BT1, states_BTE, 0).astype(jnp.float32),
        mask_BT=tokens.mask_BT,
        pooled_BE=pool(states_BTE, tokens),
    )


def sketch(source: str, config: Mapping) -> TextEncoder:
    """An encoder of the sizes that a config.json tells, without weights and words.

    Shapes alone can be asked of it. Raises `UserError` where its architecture is unknown.
    """
    tower = _tower(source, config)
    return TextEncoder(
        source=source,
        length=tower.length,
        dtype=DTYPE,
        mesh=None,
        pool=tower.pool,
        tower=tower,
        folder=Folder(Path(source)),
        split=_no_words,
    )


def _no_words(captions: Sequence[str]) -> list[list[int]]:
    raise LookupError('a sketch of an encoder knows no words')


def _tower(source: str, config: Mapping) -> Tower:
    """The parts that a config.json asks for; UserError where there are none such."""
    model_type = config.get('model_type')
    if not isinstance(model_type, str) or model_type not in TOWERS:
        raise UserError(
            f'{source} is a text encoder of model_type {model_type!r}; supported: '
            f'{", ".join(sorted(TOWERS))}.'
        )
    return TOWERS[model_type](config)


def _batches(lengths: Sequence[int], longest: int, stride: int) -> Iterator[tuple[list[int], int]]:
    """Which captions share a call (at most ROWS of one padded length), and that length."""

    def padded(row: int) -> int:
        return min(max(-(-lengths[row] // stride), 1) * stride, longest)

    for T, group in itertools.groupby(sorted(range(len(lengths)), key=padded), padded):
        rows = list(group)
        for first in range(0, len(rows), ROWS):
            yield rows[first : first + ROWS], T


def _check_length(length: int, longest: int | None) -> None:
    if length < STRIDE or (longest is not None and length > longest):
        limit = 'or more' if longest is None else f'to {longest}'
        raise UserError(f'The text length is {length}; this encoder takes {STRIDE} {limit} tokens.')


def _check_vocabulary(source: str, tower: Tower, largest_id: int) -> None:
    """Raises UserError for ids beyond the model's vocabulary: JAX would clamp them."""
    if tower.filler >= tower.vocab:
        raise UserError(
            f'{source}: pad_token_id is {tower.filler}, expected a token id below {tower.vocab}.'
        )
    if largest_id >= tower.vocab:
        raise UserError(
            f'{source}: its tokenizer gives ids up to {largest_id}, but its model has '
            f'{tower.vocab} words; tokenizer and weights do not belong together.'
        )
