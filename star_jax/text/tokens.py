"""How do captions become token ids?"""

from collections.abc import Callable, Sequence
from importlib.util import find_spec

import flax.struct
import jax
import numpy as np

from star_jax.errors import UserError
from star_jax.text.folder import SPIECE, TOKENIZER, Folder

# Captions to token ids, special tokens included, truncated, not padded.
Split = Callable[[Sequence[str]], list[list[int]]]


@flax.struct.dataclass
class Tokens:
    """`ids_BT`: int32 token ids, padded on the right. `mask_BT`: int32, 1 for real tokens."""

    ids_BT: jax.Array
    mask_BT: jax.Array


def read(folder: Folder, length: int) -> tuple[Split, int]:
    """The folder's own tokenizer, truncating to `length` tokens, and the largest id it may give.

    Raises UserError where it cannot be read.
    """
    if folder.tokenizer[0].name != TOKENIZER:
        return _read_parts(folder, length)

    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(folder.tokenizer[0]))
    except Exception as error:  # the library has no class of its own
        raise _unreadable(folder, error) from error
    tokenizer.no_padding()
    tokenizer.enable_truncation(length)

    def split(captions: Sequence[str]) -> list[list[int]]:
        return [one.ids for one in tokenizer.encode_batch_fast(list(captions))]

    return split, max(tokenizer.get_vocab().values(), default=0)


def pad(ids: Sequence[Sequence[int]], rows: int, length: int, filler: int) -> Tokens:
    """Token lists as one (rows, length) block; rows beyond the lists have an empty mask."""
    tokens = Tokens(
        ids_BT=np.full((rows, length), filler, np.int32),
        mask_BT=np.zeros((rows, length), np.int32),
    )
    for row, one in enumerate(ids):
        tokens.ids_BT[row, : len(one)] = one
        tokens.mask_BT[row, : len(one)] = 1
    return tokens


def _read_parts(folder: Folder, length: int) -> tuple[Split, int]:
    if SPIECE in (path.name for path in folder.tokenizer) and not find_spec('sentencepiece'):
        raise UserError(
            f'{folder.tokenizer[0].parent} has its tokenizer in {SPIECE} alone, which needs a '
            f'package to be read; run:\npip install sentencepiece'
        )

    import transformers  # here: seconds, and only folders without tokenizer.json need it

    try:
        # The config says whose tokenizer it is where the tokenizer's own files do not.
        config = transformers.AutoConfig.from_pretrained(folder.path, local_files_only=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder.tokenizer[0].parent, config=config, local_files_only=True
        )
    except Exception as error:  # each kind of tokenizer has its own
        raise _unreadable(folder, error) from error

    def split(captions: Sequence[str]) -> list[list[int]]:
        if not len(captions):
            return []
        return tokenizer(list(captions), truncation=True, max_length=length)['input_ids']

    return split, max(tokenizer.get_vocab().values(), default=0)


def _unreadable(folder: Folder, error: Exception) -> UserError:
    reason = str(error).partition('\n')[0] or type(error).__name__
    return UserError(f'{folder.tokenizer[0]} is no tokenizer ({reason}); fetch the folder again.')
