"""How are recorded logits of a LlamaGen transformer computed? (kinds `*_teacher_forced`)

The layers run one by one, as the blocks of the network and with what its trunk gives them, so that
the arrays inside can be compared.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from star_jax.convert.entries import to_state
from star_jax.convert.llamagen import BUFFERS, llamagen_entries
from star_jax.core import condition, positions
from star_jax.core.codes import Targets
from star_jax.core.condition import LabelCondition, TextCondition
from star_jax.core.visibility import StaticVisibility, Visibility, masks
from star_jax.errors import UserError
from star_jax.families.llamagen import Llama, LlamaGen, LlamaGenText, swiglu_width
from star_jax.losses import tokens
from star_jax.nn.bind import bind
from star_jax.nn.blocks import Block
from star_jax.nn.positions import RasterRotary
from star_jax.verify import cases
from star_jax.verify.cases import Case
from star_jax.verify.comparison import (
    GRADIENTS,
    HIDDEN,
    INTEGERS,
    LOGITS,
    NORMS,
    OBJECTIVES,
    TABLES,
)
from star_jax.verify.inside import recorded
from star_jax.verify.options import check_value
from star_jax.verify.rules import Rule, inputs


class TeacherForcedRaster:
    """Logits, losses and gradients under teacher forcing, and what the network computes inside.

    Subclasses give the condition.

    Attributes:
        case: the case.
        model: the config of its transformer.
        params: its parameters.
        condition: the conditions of all images.
        valid_B: the images that count in the loss.
    """

    model: Llama
    condition: Any
    valid_B: np.ndarray

    def __init__(self, case: Case) -> None:
        self.case = case
        self.params = llamagen_params(case, self.model)
        self.codes = case.input('tokens').astype(np.int32)

    def rules(self) -> tuple[Rule, ...]:
        return (
            inputs('tokens|force_drop_ids'),
            Rule('freqs_cis', TABLES, self.table),
            Rule('cond_embed', HIDDEN, lambda: self.prefix(self.condition)),
            Rule('cond_embed_forced_drop', HIDDEN, lambda: self.prefix(self.dropped)),
            Rule('attn0_out', HIDDEN, lambda: self.inside['attention']),
            Rule(r'hidden_(\d+)', HIDDEN, lambda layer: self.inside['out'][int(layer)]),
            Rule('logits_all_positions', LOGITS, lambda: self.inside['logits']),
            Rule('logits', LOGITS, lambda: self.of_tokens(self.inside['logits'])),
            Rule('logits_forced_drop', LOGITS, self.dropped_logits),
            Rule('token_nll', OBJECTIVES, lambda: self.losses[0][1]),
            Rule('loss', OBJECTIVES, lambda: self.losses[0][0]),
            Rule('loss_all_valid', OBJECTIVES, lambda: self.losses[0][1].mean()),
            Rule('grad_global_norm', NORMS, self.gradient_norm),
            Rule('grad.(.+)', GRADIENTS, lambda name: self.gradients[name]),
        )

    @property
    def dropped(self) -> Any:
        """The conditions, with the unprompted one where the case drops it."""
        drop_B = self.case.input('force_drop_ids') == 1
        return _dropped_fn(self.model)(self.params, self.condition, self.empty, drop_B)

    @property
    def empty(self) -> Any:
        """The encoded empty prompt, one row."""
        raise NotImplementedError

    def table(self) -> np.ndarray:
        height, width = self.model.grid
        theta, inner = self.model.positions.theta, self.model.head_width
        return positions.raster_rotation(height, width, self.model.prefix, inner, theta)

    def prefix(self, rows: Any) -> jax.Array:
        return _prefix_fn(self.model)(self.params, rows)

    def of_tokens(self, logits: jax.Array) -> jax.Array:
        """The logits of the rows that predict tokens."""
        return logits[:, self.model.schedule.sampled_rows]

    def dropped_logits(self) -> jax.Array:
        arrays = self.params, self.codes[:, :-1], self.dropped
        return self.of_tokens(_inside_fn(self.model)(*arrays)['logits'])

    @functools.cached_property
    def inside(self) -> Mapping[str, Any]:
        return _inside_fn(self.model)(self.params, self.codes[:, :-1], self.condition)

    @functools.cached_property
    def losses(self) -> tuple[tuple[jax.Array, jax.Array], dict]:
        """Loss and losses of tokens, and the gradients of the loss."""
        targets = Targets(self.codes[:, :-1], self.codes)
        return _loss_fn(self.model)(self.params, targets, self.condition, self.valid_B)

    @property
    def gradients(self) -> dict[str, np.ndarray]:
        """The gradients of the loss, in the original names."""
        return to_state(llamagen_entries(self.model), jax.device_get(self.losses[1]))

    def gradient_norm(self) -> float:
        leaves = jax.tree.leaves(jax.device_get(self.losses[1]))
        return math.sqrt(sum(np.square(leaf, dtype=np.float64).sum() for leaf in leaves))


class TeacherForcedClasses(TeacherForcedRaster):
    """Images of classes."""

    def __init__(self, case: Case) -> None:
        self.model = class_config(case)
        super().__init__(case)
        self.condition = LabelCondition(case.input('labels').astype(np.int32))
        self.valid_B = np.ones(len(self.codes), bool)

    def rules(self) -> tuple[Rule, ...]:
        return (inputs('labels'), *super().rules())

    @property
    def empty(self) -> LabelCondition:
        return LabelCondition(np.array([self.model.classes], np.int32))


class TeacherForcedTexts(TeacherForcedRaster):
    """Images of captions, some of which are invalid: they have no caption and do not count."""

    def __init__(self, case: Case) -> None:
        self.model = text_config(case)
        super().__init__(case)
        self.valid_B = case.input('valid') == 1
        rows = self.model.text_rows
        if 'uncond_tokens' in case.config:
            case.check('uncond_tokens', rows)
        features = [case.input(f't5_feat_{i}')[:rows] for i in range(len(self.codes))]
        self.condition = text_condition(features, self.valid_B, self.model)

    def rules(self) -> tuple[Rule, ...]:
        return (
            inputs(r't5_feat_\d+|valid'),
            Rule('caption', HIDDEN, lambda: aligned(self.model, self.params, self.condition)),
            Rule('attn_mask', INTEGERS, self.mask),
            *super().rules(),
        )

    @property
    def empty(self) -> TextCondition:
        return jax.tree.map(lambda x: x[:1], self.condition)

    def mask(self) -> jax.Array:
        """[B, 1, T + N, T + N]: which row attends to which, the last token included."""
        rows = self.model.prefix + self.model.schedule.length
        bounds = StaticVisibility.of(np.arange(1, rows + 1))
        padding_B = padding(self.model, self.params, self.condition)
        return masks(Visibility(bounds=bounds, first_B=padding_B), (rows,))[0]


def class_config(case: Case) -> LlamaGen:
    """The class-conditional transformer of the original options."""
    check_value(case.path, 'model.cls_token_num', case.option('model', 'cls_token_num'), 1)
    if case.option('model', 'class_dropout_prob') <= 0:
        raise UserError(
            f'{case.path}: model.class_dropout_prob is 0, so that there is no null class: only '
            'models with one are implemented'
        )
    return _config(case, LlamaGen, 'c2i', classes=case.option('model', 'num_classes'))


def text_config(case: Case) -> LlamaGenText:
    """The text-conditional transformer of the original options."""
    return _config(
        case,
        LlamaGenText,
        't2i',
        text_width=case.option('model', 'caption_dim'),
        text_rows=case.option('model', 'cls_token_num'),
    )


def _config(case: Case, cls: type[Llama], kind: str, **fields: Any) -> Any:
    def option(name: str) -> Any:
        return case.option('model', name)

    check_value(case.path, 'model.model_type', option('model_type'), kind)
    width, tokens = option('dim'), option('block_size')
    side = math.isqrt(tokens)
    if tokens != side**2:
        raise UserError(
            f'{case.path}: model.block_size must be the number of tokens of a square, not {tokens}'
        )
    model = cases.build(
        case,
        cls,
        depth=option('n_layer'),
        width=width,
        heads=option('n_head'),
        kv_heads=option('n_kv_head') or 0,
        hidden=swiglu_width(width, option('ffn_dim_multiplier') or 1.0, option('multiple_of')),
        grid=(side, side),
        codes=option('vocab_size'),
        positions=RasterRotary(theta=float(option('rope_base'))),
        norm_epsilon=option('norm_eps'),
        **fields,
    )
    for name, derived in {'head_dim': model.head_width, 'ffn_hidden': model.hidden}.items():
        check_value(case.path, f'model.{name}', option(name), derived)
    return model


def llamagen_params(case: Case, model: Llama) -> dict:
    """The parameters of the recorded state dict."""
    return cases.convert(case, llamagen_entries(model), case.state, BUFFERS)


def text_condition(
    features: list[np.ndarray], valid_B: np.ndarray, model: LlamaGenText
) -> TextCondition:
    """Features of texts, each [tokens, E]; of an invalid one all rows are visible and zero."""
    rows, width = model.text_rows, model.text_width
    shown = [
        x if valid else np.zeros((rows, width), np.float32)
        for x, valid in zip(features, valid_B, strict=True)
    ]
    return condition.unpack(np.concatenate(shown), [len(x) for x in shown])


def aligned(model: LlamaGenText, params: dict, text: TextCondition) -> np.ndarray:
    """[B, T, E]: the states of the prefix."""
    return np.asarray(bind(model.starter, params['starter']).states(text))


def padding(model: LlamaGenText, params: dict, text: TextCondition) -> np.ndarray:
    """[B]: the rows of the prefix before the first state."""
    return np.asarray(bind(model.starter, params['starter']).padding(text))


@functools.cache
def _prefix_fn(model: Llama) -> Callable:
    return jax.jit(lambda params, rows: bind(model.build(), params).start(rows))


@functools.cache
def _dropped_fn(model: Llama) -> Callable:
    def drop(params: dict, rows: Any, empty: Any, drop_B: np.ndarray) -> Any:
        unprompted = bind(model.build(), params).unprompted(rows, empty)
        return condition.choose(drop_B, rows, unprompted)

    return jax.jit(drop)


@functools.cache
def _inside_fn(model: Llama) -> Callable:
    """(params, codes, condition) -> what the network computes, by recorded name, jitted."""
    return jax.jit(functools.partial(_inside, model))


def _inside(model: Llama, params: dict, codes_BL: jax.Array, rows: Any) -> dict[str, Any]:
    network, schedule = bind(model.build(), params), model.schedule
    numbers = np.arange(schedule.starts[-1])
    embedded = network.embed(codes_BL, numbers[model.prefix :])
    x_BLD = jnp.concatenate([network.start(rows), embedded], axis=1)
    per_layer, shared = network.block_inputs(
        numbers,
        text_kv=None,
        condition=rows,
        visibility=Visibility(bounds=schedule.visibility()),
    )
    found = {'out': []}
    for layer in range(model.depth):
        block = jax.tree.map(lambda x, i=layer: x[i], params['blocks'])
        (x_BLD, _), parts = recorded(Block(network.block), block, x_BLD, per_layer, shared)
        found['out'].append(x_BLD)
        if layer == 0:
            found['attention'] = parts['attn'][1][0]
    return found | {'logits': network.head(x_BLD, rows)}


@functools.cache
def _loss_fn(model: Llama) -> Callable:
    """(params, targets, condition, valid_B) -> (loss, losses of tokens), gradients."""

    def loss(params, targets, rows, valid_B):
        losses = tokens.token_losses(model.build(), model.vocabulary, params, targets, rows)
        counted_B1 = jnp.asarray(valid_B, jnp.float32)[:, None]
        count = jnp.maximum(valid_B.sum() * losses.nll_BL.shape[1], 1)
        return (losses.nll_BL * counted_B1).sum() / count, losses.nll_BL

    return jax.jit(jax.value_and_grad(loss, has_aux=True))
