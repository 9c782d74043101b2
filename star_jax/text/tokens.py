"""How do captions become token ids?"""

from collections.abc import Callable, Sequence
from importlib.util import find_spec

import flax.struct
import jax
import numpy as np

from star_jax.errors import UserError
from star_jax.text.encoder_folder import SPIECE, TOKENIZER, EncoderFolder

# Captions to token ids, with special tokens, truncated, not padded.
CaptionsToIds = Callable[[Sequence[str]], list[list[int]]]


@flax.struct.dataclass
class Tokens:
    """Token ids of B captions, padded to T.

    Attributes:
        ids_BT: int32 token ids, padded on the right.
        mask_BT: int32, 1 for real tokens.
    """

    ids_BT: jax.Array
    mask_BT: jax.Array


def load_tokenizer(folder: EncoderFolder, length: int) -> tuple[CaptionsToIds, int]:
    """Loads the tokenizer of a folder.

    Args:
        folder: the folder of the encoder.
        length: tokens per caption, at which a caption is truncated.

    Returns:
        The function from captions to ids, and the largest id of the vocabulary.

    Raises:
        UserError: the tokenizer cannot be read.
    """
    if folder.tokenizer[0].name != TOKENIZER:
        return _load_slow_tokenizer(folder, length)

    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(folder.tokenizer[0]))
    except Exception as error:  # the library has no exception class of its own
        raise _unreadable(folder, error) from error
    tokenizer.no_padding()
    tokenizer.enable_truncation(length)

    def token_ids(captions: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in tokenizer.encode_batch_fast(list(captions))]

    return token_ids, max(tokenizer.get_vocab().values(), default=0)


def pad(ids: Sequence[Sequence[int]], rows: int, length: int, pad_id: int) -> Tokens:
    """Lists of token ids as one (rows, length) block; rows beyond the lists have an empty mask."""
    tokens = Tokens(
        ids_BT=np.full((rows, length), pad_id, np.int32),
        mask_BT=np.zeros((rows, length), np.int32),
    )
    for row, caption_ids in enumerate(ids):
        tokens.ids_BT[row, : len(caption_ids)] = caption_ids
        tokens.mask_BT[row, : len(caption_ids)] = 1
    return tokens


def _load_slow_tokenizer(folder: EncoderFolder, length: int) -> tuple[CaptionsToIds, int]:
    """The tokenizer of a folder without tokenizer.json, by transformers."""
    if SPIECE in (path.name for path in folder.tokenizer) and not find_spec('sentencepiece'):
        raise UserError(
            f'{folder.tokenizer[0].parent} has its tokenizer in {SPIECE} alone, which needs a '
            f'package to be read; run:\npip install sentencepiece'
        )

    import transformers  # here: seconds, and only folders without tokenizer.json need it

    try:
        # The config names the tokenizer class if the tokenizer's files do not.
        config = transformers.AutoConfig.from_pretrained(folder.path, local_files_only=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder.tokenizer[0].parent, config=config, local_files_only=True
        )
    except Exception as error:  # each tokenizer class raises its own
        raise _unreadable(folder, error) from error

    def token_ids(captions: Sequence[str]) -> list[list[int]]:
        if not len(captions):
            return []
        return tokenizer(list(captions), truncation=True, max_length=length)['input_ids']

    return token_ids, max(tokenizer.get_vocab().values(), default=0)


def _unreadable(folder: EncoderFolder, error: Exception) -> UserError:
    reason = str(error).partition('\n')[0] or type(error).__name__
    return UserError(
        f'{folder.tokenizer[0]} is not a tokenizer ({reason}); fetch the folder again.'
    )
