"""How does a caption become the condition of an image model?

`load` reads a pretrained encoder; a `TextEncoder` turns captions into a `TextCondition`: token
states, mask and a pooled vector. The weights are frozen: `apply` is pure and may be traced inside a
training program, `encode` is the same for captions on the host.
"""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from star_jax.core.condition import TextCondition
from star_jax.errors import UserError
from star_jax.parallel import rules
from star_jax.text import bert, clip, t5
from star_jax.text.encoder_folder import DEFAULT, EncoderFolder, absolute_source, locate
from star_jax.text.tokens import CaptionsToIds, Tokens, load_tokenizer, pad
from star_jax.text.tower import Pool, Tower
from star_jax.text.weights import EncoderWeights

# Captions per compiled call. All calls have the same number, so that the features of a caption do
# not depend on the other captions; 16 keep a processor busy and cost little for one prompt.
BATCH = 16
# Compiled lengths are multiples of this: most captions are far shorter than the maximum.
LENGTH_MULTIPLE = 8
# To be raised when an encoder computes other numbers from the same files: cached features expire.
REVISION = 1
DTYPE = 'float32'
DTYPES = (DTYPE, 'bfloat16')


# By the `model_type` of a config.json.
TOWERS: dict[str, Callable[[Mapping], Tower]] = {
    'bert': bert.build_tower,
    'clip': clip.build_tower,
    'clip_text_model': clip.build_tower,
    't5': t5.build_tower,
}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TextEncoder:
    """A frozen text encoder, a `protocols.PromptEncoder`.

    Attributes:
        field: the field of a batch that holds the prompts.
        source: 'package:NAME', the path of a folder, or a hub id.
        length: T, tokens per caption.
        dtype: dtype of parameters and activations, 'float32' or 'bfloat16'.
        mesh: the mesh over which the parameters are sharded by their logical axes (None: one
            device).
        pool: the function from token states to one vector per caption.
        tower: the parts of the architecture.
        folder: the files.
        token_ids: the tokenizer, truncating to `length`.
        clean: cleans a caption before it is tokenized (None: captions stay as they are).
    """

    field: ClassVar[Literal['caption']] = 'caption'

    source: str
    length: int
    dtype: str
    mesh: Mesh | None
    pool: Pool
    tower: Tower
    folder: EncoderFolder
    token_ids: CaptionsToIds
    clean: Callable[[str], str] | None = None

    @property
    def width(self) -> int:
        """E, channels of token states and pooled vectors."""
        return self.tower.width

    @functools.cached_property
    def params(self) -> dict:
        """The parameters on the devices, loaded tensor by tensor on first access."""
        return self.weights.load(self.dtype, self.mesh)

    @functools.cached_property
    def sha256(self) -> str:
        """Hex digest of the config, weights and tokenizer files."""
        return self.folder.sha256()

    @functools.cached_property
    def identity(self) -> str:
        """Hex digest of everything that affects the features of a caption: the key of caches."""
        parts = [REVISION, self.length, self.sha256]
        # Defaults are left out, so that older caches stay valid.
        parts += [self.dtype] if self.dtype != DTYPE else []
        parts += [self.pool] if self.pool != self.tower.pool else []
        parts += [f'{self.clean.__module__}.{self.clean.__qualname__}'] if self.clean else []
        return hashlib.sha256(' '.join(map(str, parts)).encode()).hexdigest()

    def reference(self) -> dict[str, str]:
        """The entry in the config.json of a model folder; `load(**reference)` checks the sha256."""
        return {'source': self.source, 'sha256': self.sha256}

    def abstract_params(self) -> dict:
        """Shapes of `params`, boxed with their logical axes."""
        tokens = pad([], rows=1, length=LENGTH_MULTIPLE, pad_id=0)
        shapes = jax.eval_shape(self.tower.module.init, jax.random.key(0), tokens)['params']
        dtype = jnp.dtype(self.dtype)
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes)

    def abstract_tokens(self, rows: int) -> Tokens:
        """Shapes of the tokens of `rows` captions."""
        ids_BT = jax.ShapeDtypeStruct((rows, self.length), jnp.int32)
        return Tokens(ids_BT=ids_BT, mask_BT=ids_BT)

    @functools.cached_property
    def weights(self) -> EncoderWeights:
        """The tensors that fill the parameters."""
        return EncoderWeights(
            folder=self.folder,
            mappings=tuple(self.tower.weight_mappings(self.folder.tensors())),
            boxed=self.abstract_params(),
        )

    def tokenize(self, prompts: Sequence[str]) -> Tokens:
        """The host part: [B, T] numpy int32, truncated and padded to `length`."""
        return pad(self._ids(prompts), len(prompts), self.length, self.tower.pad_id)

    def apply(self, params: dict, tokens: Tokens) -> TextCondition:
        """The device part, pure: float32 features, with zero states at padding.

        Args:
            params: the parameters of the encoder.
            tokens: [B, T]; T is `length`, or any smaller number if the pool reads no padding.
        """
        return read_states(self.tower, self.pool, params, tokens)

    def encode(self, prompts: Sequence[str]) -> TextCondition:
        """Features of any number of prompts as numpy arrays, padded to `length`.

        A caption that occurs several times is encoded once. Batches have one size and hold prompts
        of similar length. The result equals `apply` of `tokenize` up to rounding.
        """
        unique = {caption: row for row, caption in enumerate(dict.fromkeys(prompts))}
        ids = self._ids(list(unique))
        multiple = self.length if self.pool.reads_padding else LENGTH_MULTIPLE
        outputs = []
        for rows, T in _batches([len(caption_ids) for caption_ids in ids], self.length, multiple):
            tokens = pad([ids[row] for row in rows], BATCH, T, self.tower.pad_id)
            outputs.append((rows, self._jitted_apply(self.params, tokens)))
        states_NTE = np.zeros((len(unique), self.length, self.width), np.float32)
        mask_NT = np.zeros((len(unique), self.length), np.int32)
        pooled_NE = np.zeros((len(unique), self.width), np.float32)
        for rows, text in outputs:
            T = text.mask_BT.shape[1]
            states_NTE[rows, :T] = np.asarray(text.states_BTE)[: len(rows)]
            mask_NT[rows, :T] = np.asarray(text.mask_BT)[: len(rows)]
            pooled_NE[rows] = np.asarray(text.pooled_BE)[: len(rows)]
        rows_B = np.array([unique[caption] for caption in prompts], int)
        return TextCondition(
            states_BTE=states_NTE[rows_B], mask_BT=mask_NT[rows_B], pooled_BE=pooled_NE[rows_B]
        )

    def _ids(self, captions: Sequence[str]) -> list[list[int]]:
        """Token ids of captions, cleaned first."""
        return self.token_ids([self.clean(text) for text in captions] if self.clean else captions)

    @functools.cached_property
    def _jitted_apply(self) -> Callable[[dict, Tokens], TextCondition]:
        return jax.jit(self.apply, out_shardings=rules.replicated(self.mesh) if self.mesh else None)


def load(
    source: str = DEFAULT,
    length: int | None = None,
    sha256: str | None = None,
    *,
    most: int | None = None,
    dtype: str = DTYPE,
    mesh: Mesh | None = None,
    pool: Pool | None = None,
) -> TextEncoder:
    """Loads a text encoder; its parameters are read on first use.

    Args:
        source: 'package:NAME', the path of a folder, or a hub id.
        length: tokens per caption (None: the default of the architecture).
        sha256: the expected digest of the files, as recorded by `TextEncoder.reference`.
        most: instead of `length`, tokens that a model reads (its `text_rows`): so many per caption,
            or as many as the architecture has positions.
        dtype: dtype of parameters and activations, 'float32' or 'bfloat16'.
        mesh: devices that share the parameters; all their processes must encode the same captions.
        pool: the pool (None: the default of the architecture).

    Raises:
        UserError: the files are not available or damaged, have another digest, or are of an
            unsupported architecture; or the number of tokens does not fit.
    """
    folder = locate(source)
    tower = _build_tower(source, folder.config)
    if dtype not in DTYPES:
        raise UserError(
            f'the dtype of a text encoder is {dtype!r}; supported: {", ".join(DTYPES)}.'
        )
    if length is not None and most is not None:
        raise UserError(f'length is {length} and most is {most}: give only one of them.')
    length = _length(tower, most) if length is None else length
    _check_length(length, tower.max_length)
    token_ids, largest_id = load_tokenizer(folder, length)
    encoder = TextEncoder(
        source=absolute_source(source),
        length=length,
        dtype=dtype,
        mesh=mesh,
        pool=tower.pool if pool is None else pool,
        tower=tower,
        folder=folder,
        token_ids=token_ids,
    )
    encoder.weights.check()  # before the digest: its error for a truncated file is clearer
    if sha256 is not None and sha256 != encoder.sha256:
        raise UserError(
            f'The model was trained with the text encoder of sha256 {sha256}, but {source} has '
            f'{encoder.sha256}; name the folder of the encoder that it was trained with.'
        )
    _check_vocabulary(source, tower, largest_id)
    return encoder


def read_states(tower: Tower, pool: Pool, params: dict, tokens: Tokens) -> TextCondition:
    """Pure: float32 features of tokens [B, T], with zero states at padding."""
    # Features are cached: the rounding of faster float32 products would stay in all later runs.
    with jax.default_matmul_precision('highest'):
        states_BTE = tower.module.apply({'params': params}, tokens)
    real_BT1 = tokens.mask_BT[:, :, None] > 0
    return TextCondition(
        states_BTE=jnp.where(real_BT1, states_BTE, 0).astype(jnp.float32),
        mask_BT=tokens.mask_BT,
        pooled_BE=pool(states_BTE, tokens),
    )


def abstract_encoder(
    source: str, config: Mapping, dtype: str = DTYPE, most: int | None = None
) -> TextEncoder:
    """An encoder of the sizes of a config.json, without weights and tokenizer: it has shapes only.

    Other arguments are those of `load`. Raises `UserError` for an unsupported architecture, or
    where `most` is too small.
    """
    tower = _build_tower(source, config)
    return TextEncoder(
        source=source,
        length=_length(tower, most),
        dtype=dtype,
        mesh=None,
        pool=tower.pool,
        tower=tower,
        folder=EncoderFolder(Path(source)),
        token_ids=_no_tokenizer,
    )


def _no_tokenizer(captions: Sequence[str]) -> list[list[int]]:
    raise LookupError('an abstract encoder has no tokenizer')


def _build_tower(source: str, config: Mapping) -> Tower:
    """The encoder of a config.json; UserError for an unsupported architecture."""
    model_type = config.get('model_type')
    if not isinstance(model_type, str) or model_type not in TOWERS:
        raise UserError(
            f'{source} is a text encoder of model_type {model_type!r}; supported: '
            f'{", ".join(sorted(TOWERS))}.'
        )
    return TOWERS[model_type](config)


def _batches(
    lengths: Sequence[int], max_length: int, multiple: int
) -> Iterator[tuple[list[int], int]]:
    """Batches of at most BATCH captions of one padded length: their numbers, and that length.

    Args:
        lengths: tokens of every caption.
        max_length: the largest padded length.
        multiple: padded lengths are multiples of it.
    """

    def padded_length(row: int) -> int:
        return min(max(-(-lengths[row] // multiple), 1) * multiple, max_length)

    by_length = sorted(range(len(lengths)), key=padded_length)
    for T, group in itertools.groupby(by_length, padded_length):
        rows = list(group)
        for first in range(0, len(rows), BATCH):
            yield rows[first : first + BATCH], T


def _length(tower: Tower, most: int | None) -> int:
    """Tokens per caption: `most`, or as many as there are positions; the default for None.

    Raises UserError where `most` is too small.
    """
    if most is None:
        return tower.default_length
    if most < LENGTH_MULTIPLE:
        raise UserError(
            f'The model reads {most} text tokens (text_rows), but text encoders give '
            f'{LENGTH_MULTIPLE} or more: set text_rows to {LENGTH_MULTIPLE} or more.'
        )
    return min(most, tower.max_length or most)


def _check_length(length: int, max_length: int | None) -> None:
    if length < LENGTH_MULTIPLE or (max_length is not None and length > max_length):
        limit = 'or more' if max_length is None else f'to {max_length}'
        raise UserError(
            f'The text length is {length}; this encoder takes {LENGTH_MULTIPLE} {limit} tokens.'
        )


def _check_vocabulary(source: str, tower: Tower, largest_id: int) -> None:
    """Raises UserError for ids outside the vocabulary of the model, which JAX would clamp."""
    if tower.pad_id >= tower.vocab:
        raise UserError(
            f'{source}: pad_token_id is {tower.pad_id}, expected a token id below {tower.vocab}.'
        )
    if largest_id >= tower.vocab:
        raise UserError(
            f'{source}: its tokenizer gives ids up to {largest_id}, but its model has '
            f'{tower.vocab} words; tokenizer and weights do not belong together.'
        )
