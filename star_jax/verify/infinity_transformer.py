"""How are recorded logits of an Infinity transformer computed? (kind `transformer`)

The layers run one by one, as the blocks of the network and with what its trunk gives them, so that
the arrays inside of the first one can be compared.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from star_jax.convert.infinity import BUFFERS, infinity_entries
from star_jax.core import condition
from star_jax.core.condition import TextCondition
from star_jax.core.visibility import Visibility
from star_jax.errors import UserError
from star_jax.families.infinity import Infinity
from star_jax.nn.bind import bind
from star_jax.nn.blocks import Block
from star_jax.tokenizers.sign_quantiser import PATCH
from star_jax.verify import cases
from star_jax.verify.cases import Case
from star_jax.verify.comparison import ACTIVATIONS, INFORMATION, INTEGERS
from star_jax.verify.infinity import images, rotary_of
from star_jax.verify.inside import recorded
from star_jax.verify.rules import Rule, inputs

TEXT = 'in/(?:neg_)?(?:text_packed|text_lens|cu_seqlens)'
PARTS = {'sa': 'attn', 'ca': 'cross', 'ffn': 'ffn'}  # recorded and our names of parts of a block


class TeacherForcedBits:
    """Logits under teacher forcing, with and without text, and what the network computes inside."""

    def __init__(self, case: Case) -> None:
        self.case = case
        option = case.option
        bits, cell = option('transformer_d_vae'), case.optional('tokenizer_codebook_dim')
        joined = PATCH**2 if option('apply_spatial_patchify') else 1
        if cell and bits != joined * cell:
            raise UserError(
                f'{case.path}: transformer_d_vae is {bits}, expected {joined} x the '
                f'tokenizer_codebook_dim {cell}'
            )
        self.infinity = infinity_config(
            case,
            bits=bits,
            schedule=option('schedule'),
            reference=option('rope_reference_schedule'),
        )
        self.params = infinity_params(case, self.infinity, case.state)
        self.text = text_of(case, 'in/')
        self.inputs = case.input('in/x_wo_prefix')

    def rules(self) -> tuple[Rule, ...]:
        part = f'mid/block0_({"|".join(PARTS)})_(in|out)'
        return (
            inputs(r'in/(?:x_wo_prefix|labels/s\d+|drop_mask)'),
            inputs(TEXT),
            Rule('out/logits', ACTIVATIONS, lambda: self.inside['logits']),
            Rule('out/logits_all_dropped', ACTIVATIONS, lambda: self.logits(True)),
            Rule(
                'out/logits_partly_dropped',
                ACTIVATIONS,
                lambda: self.logits(self.case.input('in/drop_mask')),
            ),
            Rule('out/logits_prefix_schedule', ACTIVATIONS, self.first_scales),
            Rule('out/logits_bf16_crossattn', INFORMATION, lambda: self.inside['logits']),
            Rule('mid/attention_visible', INTEGERS, self.infinity.schedule.mask),
            Rule('mid/(text_norm|ca_kv)', ACTIVATIONS, lambda name: self.packed(self.inside[name])),
            Rule(part, ACTIVATIONS, lambda name, side: self.inside[f'{name}_{side}']),
            Rule(r'mid/block(\d+)_out', ACTIVATIONS, lambda layer: self.inside['out'][int(layer)]),
            Rule('mid/(.+)', ACTIVATIONS, lambda name: self.inside[name]),
        )

    def logits(self, drop: bool | np.ndarray) -> jax.Array:
        """The logits, with learned rows instead of the text of the images to `drop`."""
        drop_B = np.broadcast_to(drop, len(self.inputs))
        return dropped_fn(self.infinity)(self.params, self.inputs, self.text, drop_B)

    def first_scales(self) -> jax.Array:
        """The logits of a schedule that ends earlier, on the same reference grid."""
        grids = images(self.case.option('prefix_schedule'), self.case)
        whole = self.infinity.schedule
        shorter = cases.build(self.case, Infinity, **{**vars(self.infinity), 'grids': grids})
        inputs = self.inputs[:, : shorter.schedule.length - whole.sizes[0]]
        keep_B = np.zeros(len(inputs), bool)
        return dropped_fn(shorter)(self.params, inputs, self.text, keep_B)

    def packed(self, states_BTE: np.ndarray) -> np.ndarray:
        """Text states in the recorded layout, without padding."""
        return np.asarray(states_BTE)[self.text.mask_BT > 0]

    @functools.cached_property
    def inside(self) -> Mapping[str, Any]:
        return inside_fn(self.infinity)(self.params, self.inputs, self.text)


def infinity_config(
    case: Case, *, bits: int, schedule: list[list[int]], reference: list[list[int]]
) -> Infinity:
    """The transformer of the original options."""

    def option(name: str) -> Any:
        return case.option('options', name)

    return cases.build(
        case,
        Infinity,
        depth=option('depth'),
        width=option('embed_dim'),
        heads=option('num_heads'),
        mlp_ratio=option('mlp_ratio'),
        bits=bits,
        grids=images(schedule, case),
        reference=images(reference, case)[-1],
        text_width=case.option('text_channels'),
        text_rows=case.option('text_maxlen'),
        positions=rotary_of(case, option('rope2d_normalized_by_hw')),
        levels_every=_levels_every(
            option('add_lvl_embeding_only_first_block'), option('depth'), option('block_chunks')
        ),
        shared_adaln=option('shared_aln'),
        modulated_head=option('head_aln'),
        head_layers=option('head_depth'),
        qk_norm=option('cos_attn'),
        score_temperature=option('tau'),
        rms_norm=option('rms_norm'),
        swiglu=option('swiglu'),
        input_norm=option('nm0'),
        cross_scale=option('cross_attn_layer_scale'),
        row_multiple=option('pad_to_multiplier') or 1,
    )


def _levels_every(once: int, depth: int, chunks: int) -> int:
    """Blocks before which the level embedding is added: the first of each chunk, or every one."""
    return 0 if once else depth // chunks if chunks > 1 else 1


def infinity_params(case: Case, infinity: Infinity, state: Mapping[str, np.ndarray]) -> dict:
    """The parameters of a state dict in the original names."""
    entries = infinity_entries(infinity, case.option('options', 'block_chunks'))
    return cases.convert(case, entries, state, BUFFERS)


def text_of(case: Case, prefix: str) -> TextCondition:
    """The recorded text, unpacked."""
    lengths = case.input(f'{prefix}text_lens').tolist()
    return condition.unpack(case.input(f'{prefix}text_packed'), lengths)


@functools.cache
def dropped_fn(infinity: Infinity) -> Callable:
    """(params, inputs, text, images without text [B]) -> flat logits, jitted."""

    def forward(params, inputs, text, drop_B):
        network = bind(infinity.build(), params)
        unprompted = network.unprompted(text, text)
        return network(inputs, condition.choose(drop_B, text, unprompted))

    return jax.jit(forward)


@functools.cache
def inside_fn(infinity: Infinity) -> Callable:
    """(params, inputs, text) -> what the network computes, by recorded name, jitted."""
    return jax.jit(functools.partial(_inside, infinity))


def _inside(
    infinity: Infinity, params: dict, inputs: jax.Array, text: TextCondition
) -> dict[str, Any]:
    network, schedule = bind(infinity.build(), params), infinity.schedule
    rows = np.arange(schedule.length)
    embedded = network.embedder(inputs)
    x_BLD = jnp.concatenate([network.start(text), network.embed(inputs, rows[1:])], axis=1)
    per_layer, shared = network.block_inputs(
        rows,
        text_kv=network.text_kv(text),
        condition=text,
        visibility=Visibility(bounds=schedule.visibility()),
    )
    found = {
        'sos': network.starter.summary(text),
        'text_norm': network.starter.normalised(text)[0],
        'ca_kv': network.starter.text(text)[0],
        'shared_ada': shared.signal,
        'word_embed': embedded,
        'block0_in': x_BLD if shared.levels_LD is None else x_BLD + shared.levels_LD,
        'out': [],
    }
    for layer in range(infinity.depth):
        block, arrays = jax.tree.map(lambda x, i=layer: x[i], (params['blocks'], per_layer))
        (x_BLD, _), parts = recorded(Block(network.block), block, x_BLD, arrays, shared)
        found['out'].append(x_BLD)
        if layer == 0:
            for name, part in PARTS.items():
                found[f'{name}_in'], out = parts[part]
                found[f'{name}_out'] = out[0] if isinstance(out, tuple) else out
    head = infinity.build().to_logits
    logits, parts = recorded(head, params['to_logits'], x_BLD, found['sos'])
    found['head_nm'] = x_BLD  # where the norm belongs to the head
    if infinity.modulated_head:
        found['head_nm'] = parts['inner' if infinity.head_layers == 2 else 'logits'][0]
    return found | {'logits': logits}
