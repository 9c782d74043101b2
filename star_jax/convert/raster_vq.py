"""Which parameter does each published tensor of a LlamaGen tokenizer become?

LlamaGen specification 6.3. The blocks of the decoder count from the lowest resolution there, and
from the highest here.
"""

import re

from star_jax.checkpoint.weights import flatten
from star_jax.convert.entries import Entry
from star_jax.convert.star import SAME
from star_jax.tokenizers.raster_vq import RasterVQ

IGNORED = ('quantize.codebook_used',)  # the last 65,536 codes of training

MIDDLE = {'mid_block_1': 'mid.0', 'mid_attn_1': 'mid.1', 'mid_block_2': 'mid.2'}
KINDS = {'block': 'res', 'attn': 'attn'}


def raster_vq_entries(config: RasterVQ) -> list[Entry]:
    """The table of a tokenizer."""
    levels = len(config.autoencoder.widths)
    entries = []
    for name, leaf in flatten(config.abstract()).items():
        if name == 'quantiser/codebook':
            entries.append(Entry('quantize.embedding.weight', name, 'code width -> code width'))
        else:
            pattern = 'o i h w -> h w i o' if leaf.ndim == 4 else SAME
            entries.append(Entry(_torch_name(name, levels), name, pattern))
    return entries


def _torch_name(name: str, levels: int) -> str:
    """decoder/up_0_block_1/conv1/kernel -> decoder.conv_blocks.4.res.1.conv1.weight"""
    words = re.sub(r'/(kernel|scale)$', '/weight', name).split('/')
    return '.'.join(_torch_word(word, levels) for word in words)


def _torch_word(word: str, levels: int) -> str:
    if word in MIDDLE:
        return MIDDLE[word]
    match = re.fullmatch(r'(down|up)_(\d+)_(block|attn|downsample|upsample)(?:_(\d+))?', word)
    if not match:
        return word
    side, level, kind, index = match.groups()
    block = int(level) if side == 'down' else levels - 1 - int(level)
    inner = f'{KINDS[kind]}.{index}' if index else f'{kind}.conv'
    return f'conv_blocks.{block}.{inner}'
