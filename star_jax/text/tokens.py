"""How do captions become token ids?"""

from collections.abc import Callable, Sequence

import flax.struct
import jax
import numpy as np

from star_jax.text.folder import TOKENIZER, Folder

# Captions to token ids, special tokens included, truncated, not padded.
Split = Callable[[Sequence[str]], list[list[int]]]


@flax.struct.dataclass
class Tokens:
    """`ids_BT`: int32 token ids, padded on the right. `mask_BT`: int32, 1 for real tokens."""

    ids_BT: jax.Array
    mask_BT: jax.Array


def read(folder: Folder, length: int) -> Split:
    """The folder's own tokenizer, truncating to `length` tokens."""
    if folder.tokenizer[0].name != TOKENIZER:
        return _read_parts(folder, length)

    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(folder.tokenizer[0]))
    tokenizer.no_padding()
    tokenizer.enable_truncation(length)
    return lambda captions: [one.ids for one in tokenizer.encode_batch_fast(list(captions))]


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


def _read_parts(folder: Folder, length: int) -> Split:
    import transformers  # here: seconds, and only folders without tokenizer.json need it

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder.path, local_files_only=True)
    return lambda captions: (
        tokenizer(list(captions), truncation=True, max_length=length)['input_ids']
        if len(captions)
        else []
    )
