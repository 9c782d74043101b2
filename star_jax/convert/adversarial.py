"""Which parameter does each published tensor of a tokenizer's training losses become?

LlamaGen specification 1.6 and 6.3: the discriminator, its running statistics, and LPIPS.
"""

from collections.abc import Mapping

import einops
import numpy as np

from star_jax.convert.entries import Entry
from star_jax.convert.star import SAME
from star_jax.nn.discriminators import PatchGAN, Statistics
from star_jax.nn.perceptual import STAGES, Lpips

CONV = 'o i h w -> h w i o'


def discriminator_entries(config: PatchGAN, prefix: str = '') -> list[Entry]:
    """The table of a patch discriminator; a training file stores it without a prefix."""
    last = f'{prefix}main.{2 + 3 * config.layers}'
    entries = [
        Entry(f'{prefix}main.0.weight', 'conv_0/kernel', CONV),
        Entry(f'{prefix}main.0.bias', 'conv_0/bias', SAME),
        Entry(f'{last}.weight', 'conv_out/kernel', CONV),
        Entry(f'{last}.bias', 'conv_out/bias', SAME),
    ]
    for layer in range(1, config.layers + 1):
        norm = norm_name(layer, prefix)
        entries += [
            Entry(f'{prefix}main.{3 * layer - 1}.weight', f'conv_{layer}/kernel', CONV),
            Entry(f'{norm}.weight', f'norm_{layer}/scale', SAME),
            Entry(f'{norm}.bias', f'norm_{layer}/bias', SAME),
        ]
    return entries


def norm_name(layer: int, prefix: str = '') -> str:
    """The module of the batch norm of a layer, counted from 1."""
    return f'{prefix}main.{3 * layer}'


def statistics(
    config: PatchGAN, state: Mapping[str, np.ndarray], prefix: str = ''
) -> dict[str, Statistics]:
    """The running statistics of a patch discriminator."""
    names = {layer: norm_name(layer, prefix) for layer in range(1, config.layers + 1)}
    return {
        f'norm_{layer}': Statistics(state[f'{name}.running_mean'], state[f'{name}.running_var'])
        for layer, name in names.items()
    }


def lpips(state: Mapping[str, np.ndarray], prefix: str = '') -> Lpips:
    """The perceptual network. Raises KeyError for a missing tensor."""
    convs, index = [], 0
    for stage, count in enumerate(STAGES, 1):
        index += stage > 1  # the pooling layer
        for _ in range(count):
            name = f'{prefix}net.slice{stage}.{index}'
            kernel = einops.rearrange(state[f'{name}.weight'], CONV)
            convs.append((kernel, state[f'{name}.bias']))
            index += 2
    heads = [state[f'{prefix}lin{stage}.model.1.weight'] for stage in range(len(STAGES))]
    return Lpips(convs=tuple(convs), heads_C=tuple(head.reshape(-1) for head in heads))
