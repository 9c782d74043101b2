"""Which parameter does each published Infinity tensor become? (Infinity specification 9)"""

import dataclasses
import math
import re
from collections.abc import Iterable

from star_jax.convert.entries import Entry, layer_entries
from star_jax.convert.star import BLOCK_OFFSET, BLOCK_SCALE, LINEAR, SAME
from star_jax.convert.var import BLOCK_ADALN, LEVELS, SHARED_ADALN
from star_jax.families.infinity import Infinity

# Tensors of published files that are constant: the bias of keys, and norms without a scale.
BUFFERS = ('zero_k_bias', 'ln_wo_grad.weight')

RELEASED = ((32, 2048), (40, 3584))  # depth and width of the models in eight chunks, 2B and 8B

HEADS = '(n h) -> n h'
OUTER = (
    ('cfg_uncond', 'starter/rows', 'row e -> row e'),
    ('pos_start', 'starter/position/table', '1 row width -> row width'),
    ('text_norm.weight', 'starter/norm/scale', SAME),
    ('text_proj_for_sos.ca.mat_q', 'starter/pool/query', '1 p h -> p h'),
    ('text_proj_for_sos.ca.mat_kv.weight', 'starter/pool/text/kernel', '(two p h) e -> e two p h'),
    ('text_proj_for_sos.ca.v_bias', 'starter/pool/v_bias/bias', '(p h) -> p h'),
    ('text_proj_for_sos.ca.proj.weight', 'starter/pool/proj/kernel', 'd (p h) -> p h d'),
    ('text_proj_for_sos.ca.proj.bias', 'starter/pool/proj/bias', SAME),
    ('text_proj_for_ca.0.weight', 'starter/fc1/kernel', LINEAR),
    ('text_proj_for_ca.0.bias', 'starter/fc1/bias', SAME),
    ('text_proj_for_ca.2.weight', 'starter/fc2/kernel', LINEAR),
    ('text_proj_for_ca.2.bias', 'starter/fc2/bias', SAME),
)
HEAD_MODULATION = (
    ('head_nm.ada_lin.1.weight', 'to_logits/modulation/kernel', LINEAR),
    ('head_nm.ada_lin.1.bias', 'to_logits/modulation/bias', SAME),
)
ATTENTION = (
    ('sa.mat_qkv.weight', 'attn/qkv/kernel', '(three n h) d -> d three n h'),
    ('sa.q_bias', 'attn/q_bias/bias', HEADS),
    ('sa.v_bias', 'attn/v_bias/bias', HEADS),
    ('sa.proj.weight', 'attn/proj/kernel', 'd (n h) -> n h d'),
    ('sa.proj.bias', 'attn/proj/bias', SAME),
    ('ca.mat_q.weight', 'cross/query/kernel', '(n h) d -> d n h'),
    ('ca.mat_q.bias', 'cross/q_bias/bias', HEADS),
    ('ca.mat_kv.weight', 'cross/text/kernel', '(two n h) e -> e two n h'),
    ('ca.v_bias', 'cross/v_bias/bias', HEADS),
    ('ca.proj.weight', 'cross/proj/kernel', 'd (n h) -> n h d'),
    ('ca.proj.bias', 'cross/proj/bias', SAME),
)
SCORE_SCALE = tuple((name.replace('attn', 'sa', 1), *rest) for name, *rest in BLOCK_SCALE)
CROSS_SCALE = (('ca_gamma', 'cross_scale/scale', SAME),)
MLP = (
    ('ffn.fc1.weight', 'ffn/fc1/kernel', LINEAR),
    ('ffn.fc1.bias', 'ffn/fc1/bias', SAME),
    ('ffn.fc2.weight', 'ffn/fc2/kernel', LINEAR),
    ('ffn.fc2.bias', 'ffn/fc2/bias', SAME),
)
SWIGLU = (
    ('ffn.fcg.weight', 'ffn/gate/kernel', LINEAR),
    ('ffn.fc1.weight', 'ffn/value/kernel', LINEAR),
    ('ffn.fc2.weight', 'ffn/out/kernel', LINEAR),
)


def infinity_entries(infinity: Infinity, chunks: int) -> list[Entry]:
    """The table of a transformer whose published names count blocks in so many chunks."""
    outer = OUTER + LEVELS + _embedder(infinity) + _head(infinity)
    block = ATTENTION + _norm('ca_norm', 'cross_norm', infinity.rms_norm)
    block += SWIGLU if infinity.swiglu else MLP
    block += SCORE_SCALE if infinity.qk_norm else ()
    block += CROSS_SCALE if infinity.cross_scale >= 0 else ()
    block += BLOCK_OFFSET if infinity.shared_adaln else BLOCK_ADALN
    outer += SHARED_ADALN if infinity.shared_adaln else ()
    lengths = {'n': infinity.heads, 'three': 3, 'two': 2}
    pooling = {'p': infinity.pool_heads, 'two': 2}
    entries = [
        Entry(*rule, lengths=_split(rule[2], pooling)) if '(' in rule[2] else Entry(*rule)
        for rule in outer
    ]
    layers = layer_entries(block, 'blocks', 'blocks', infinity.depth, lengths)
    return entries + [_in_chunk(entry, infinity.depth, chunks) for entry in layers]


def _embedder(infinity: Infinity) -> tuple:
    linear = 'embedder/linear' if infinity.input_norm else 'embedder'
    norm = _norm('norm0_ve', 'embedder/norm', infinity.rms_norm) if infinity.input_norm else ()
    return (*norm, *_linear('word_embed', linear))


def _head(infinity: Infinity) -> tuple:
    """The published head is a sequence: a norm if it is not modulated, layers and GELU."""
    if infinity.modulated_head and infinity.head_layers == 1:
        return (*HEAD_MODULATION, *_linear('head', 'to_logits/logits'))
    first = 0 if infinity.modulated_head else 1
    rules = HEAD_MODULATION if first == 0 else _norm('head.0', 'to_logits/norm', infinity.rms_norm)
    if infinity.head_layers == 2:
        rules = (*rules, *_linear(f'head.{first}', 'to_logits/inner'))
        first += 2
    return (*rules, *_linear(f'head.{first}', 'to_logits/logits'))


def _linear(torch_name: str, param_name: str) -> tuple:
    return (
        (f'{torch_name}.weight', f'{param_name}/kernel', LINEAR),
        (f'{torch_name}.bias', f'{param_name}/bias', SAME),
    )


def _norm(torch_name: str, param_name: str, rms: bool) -> tuple:
    bias = () if rms else ((f'{torch_name}.bias', f'{param_name}/bias', SAME),)
    return ((f'{torch_name}.weight', f'{param_name}/scale', SAME), *bias)


def _split(pattern: str, lengths: dict[str, int]) -> tuple[tuple[str, int], ...]:
    """The lengths of the axes that a pattern names."""
    return tuple(item for item in lengths.items() if re.search(rf'\b{item[0]}\b', pattern))


def _in_chunk(entry: Entry, depth: int, chunks: int) -> Entry:
    """The entry of a block under its published name."""
    name = entry.torch_name.removeprefix(f'blocks.{entry.row}.')
    return dataclasses.replace(entry, torch_name=f'{block_name(entry.row, depth, chunks)}.{name}')


def block_name(layer: int, depth: int, chunks: int) -> str:
    """The published name of a block, of `depth` blocks in so many chunks."""
    if chunks == 1:
        return f'blocks.{layer}'
    chunk, layer = divmod(layer, depth // chunks)
    return f'block_chunks.{chunk}.module.{layer}'


def chunks_of(infinity: Infinity, names: Iterable[str]) -> int:
    """How many chunks the blocks of a file are in, from some of its tensor names.

    Without any: as many as in the published file of that size, or four where they divide the depth.
    """
    names = list(names)
    matches = (re.match(r'block_chunks\.(\d{1,9})\.', name) for name in names)
    last = max((int(match[1]) for match in matches if match), default=0)
    if names:
        return last + 1
    released = (infinity.depth, infinity.width) in RELEASED
    return math.gcd(infinity.depth, 8 if released else 4)
