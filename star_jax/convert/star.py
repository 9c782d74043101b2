"""Which parameter does each published STAR and VQ-VAE tensor become? (STAR specification 10)"""

import re
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from flax import linen as nn

from star_jax.checkpoint.weights import flatten
from star_jax.convert.entries import Entry, layer_entries
from star_jax.families.star import Star
from star_jax.nn.positions import Learned
from star_jax.tokenizers.residual_vq import VQ

# Tensors of published files that are unused or constant.
HEAD_BLOCKS = 'feat_extract_blocks'
HEAD_OFFSETS = tuple(f'{HEAD_BLOCKS}.{layer}.ada_gss' for layer in range(3))
IGNORED = ('class_emb.weight', 'zero_k_bias', 'ema_vocab_hit_SV', *HEAD_OFFSETS)

LINEAR = 'out inp -> inp out'
SAME = 'width -> width'
OUTER = (
    ('pos_start', 'starter/position/table', '1 row width -> row width'),
    ('encoder_proj.weight', 'starter/pooled/kernel', LINEAR),
    ('encoder_proj.bias', 'starter/pooled/bias', SAME),
    ('word_embed.weight', 'embedder/kernel', LINEAR),
    ('word_embed.bias', 'embedder/bias', SAME),
    ('lvl_embed.weight', 'levels', 'scale width -> scale width'),
    ('head_logits.weight', 'to_logits/logits/kernel', LINEAR),
    ('head_logits.bias', 'to_logits/logits/bias', SAME),
)
ADDITIVE = (('pos_1LC', 'table/table', '1 row width -> row width'),)
SHARED_ADALN = (
    ('lvl_embed_proj.weight', 'modulator/pair/kernel', LINEAR),
    ('lvl_embed_proj.bias', 'modulator/pair/bias', SAME),
    ('lvl_embed_adaln.1.weight', 'modulator/signal/kernel', LINEAR),
    ('lvl_embed_adaln.1.bias', 'modulator/signal/bias', SAME),
)
BLOCK = (
    ('attn.mat_qkv.weight', 'attn/qkv/kernel', '(three n h) d -> d three n h'),
    ('attn.q_bias', 'attn/q_bias/bias', '(n h) -> n h'),
    ('attn.v_bias', 'attn/v_bias/bias', '(n h) -> n h'),
    ('attn.proj.weight', 'attn/proj/kernel', 'd (n h) -> n h d'),
    ('attn.proj.bias', 'attn/proj/bias', SAME),
    ('ffn.fc1.weight', 'ffn/fc1/kernel', LINEAR),
    ('ffn.fc1.bias', 'ffn/fc1/bias', SAME),
    ('ffn.fc2.weight', 'ffn/fc2/kernel', LINEAR),
    ('ffn.fc2.bias', 'ffn/fc2/bias', SAME),
)
BLOCK_SCALE = (('attn.scale_mul_1H11', 'attn/compare/log_scale', '1 n 1 1 -> n'),)
BLOCK_OFFSET = (('ada_gss', 'modulate/offset', '1 1 six d -> six d'),)
CROSS = (
    ('cross_attn.mat_q.weight', 'cross/query/kernel', '(n h) d -> d n h'),
    ('cross_attn.mat_kv.weight', 'cross/text/kernel', '(two n h) e -> e two n h'),
    ('cross_attn.q_bias', 'cross/q_bias/bias', '(n h) -> n h'),
    ('cross_attn.v_bias', 'cross/v_bias/bias', '(n h) -> n h'),
    ('cross_attn.proj.weight', 'cross/proj/kernel', 'd (n h) -> n h d'),
    ('cross_attn.proj.bias', 'cross/proj/bias', SAME),
)
CROSS_SCALE = (('cross_attn.scale_mul_1H11', 'cross/compare/log_scale', '1 n 1 1 -> n'),)
REFINER = (
    ('pos_start_last', 'refiner/starter/position/table', '1 row width -> row width'),
    ('encoder_proj2.weight', 'refiner/starter/pooled/kernel', LINEAR),
    ('encoder_proj2.bias', 'refiner/starter/pooled/bias', SAME),
    ('word_embed_head.weight', 'refiner/embedder/kernel', LINEAR),
    ('word_embed_head.bias', 'refiner/embedder/bias', SAME),
    ('lvl_embed_2.weight', 'refiner/levels', 'scale width -> scale width'),
    ('head_proj.weight', 'refiner/merge/kernel', LINEAR),
    ('head_proj.bias', 'refiner/merge/bias', SAME),
    ('head_logits2.weight', 'refiner/to_logits/logits/kernel', LINEAR),
    ('head_logits2.bias', 'refiner/to_logits/logits/bias', SAME),
)


def star_entries(star: Star) -> list[Entry]:
    """The table of a transformer, in the order of the published file."""
    outer = OUTER
    if isinstance(star.positions, Learned):
        outer += ADDITIVE
    if not (star.level_embedding or star.shared_adaln):
        outer = tuple(rule for rule in outer if rule[1] != 'levels')
    head_block = block = BLOCK + (BLOCK_SCALE if star.qk_norm else ())
    if star.cross_attention:
        block += CROSS + (CROSS_SCALE if star.qk_norm else ())
    if star.shared_adaln:
        outer += SHARED_ADALN
        block += BLOCK_OFFSET
    lengths = {'n': star.heads, 'three': 3, 'two': 2}
    entries = [Entry(*rule) for rule in outer]
    entries += layer_entries(block, 'blocks', 'blocks', star.depth, lengths)
    if star.refinement:
        entries += [Entry(*rule) for rule in REFINER]
        layers = star.refinement.blocks
        entries += layer_entries(head_block, HEAD_BLOCKS, 'refiner/blocks', layers, lengths)
    return entries


def vq_entries(vq: VQ, names: Iterable[str]) -> list[Entry]:
    """The table of a tokenizer.

    Args:
        vq: its config.
        names: tensor names of a file, from which the names of its phi convolutions are taken; if
            empty, they follow the original code for this number of phis and scales.
    """
    names, default = set(names), {len(vq.grids): '{}', 1: 'qresi'}.get(vq.phis, 'qresi_ls.{}')
    pixels = jax.ShapeDtypeStruct((1, *vq.resolution, 3), jnp.float32)
    abstract = nn.unbox(jax.eval_shape(vq.build().init, jax.random.key(0), pixels))['params']
    entries = [Entry('quantize.embedding.weight', 'quantiser/codebook', 'code width -> code width')]
    for phi in range(vq.phis):
        torch_name = _phi_name(phi, names, default.format(phi))
        entries.append(
            Entry(f'{torch_name}.weight', 'quantiser/phi_kernel', 'o i h w -> h w i o', phi)
        )
        entries.append(Entry(f'{torch_name}.bias', 'quantiser/phi_bias', SAME, phi))
    for name, leaf in flatten(abstract).items():
        if not name.startswith('quantiser/'):
            pattern = 'o i h w -> h w i o' if leaf.ndim == 4 else SAME
            entries.append(Entry(module_name(name), name, pattern))
    return entries


def _phi_name(phi: int, names: set[str], default: str) -> str:
    prefix = 'quantize.quant_resi'
    candidates = (f'{prefix}.qresi_ls.{phi}', f'{prefix}.{phi}', f'{prefix}.qresi')
    return next((name for name in candidates if f'{name}.weight' in names), f'{prefix}.{default}')


def module_name(param_name: str) -> str:
    """encoder/down_0_block_1/conv1/kernel -> encoder.down.0.block.1.conv1.weight"""
    name = re.sub(r'/(kernel|scale)$', '/weight', param_name)
    name = re.sub(r'/(down|up)_(\d+)_(block|attn)_(\d+)/', r'/\1/\2/\3/\4/', name)
    name = re.sub(r'/(down|up)_(\d+)_(downsample|upsample)/', r'/\1/\2/\3/conv/', name)
    return name.replace('/mid_', '/mid/').replace('/', '.')
