"""How are the recorded arrays of a teacher-forced transformer computed? (kind `star`)"""

import dataclasses
import functools
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from star_jax.convert.entries import to_state
from star_jax.convert.star import star_entries
from star_jax.core.codes import Index
from star_jax.core.condition import Condition, TextCondition
from star_jax.core.visibility import Visibility
from star_jax.errors import UserError
from star_jax.families.star import Star
from star_jax.nn.bind import bind
from star_jax.protocols import Family
from star_jax.verify import cases
from star_jax.verify.cases import Case
from star_jax.verify.comparison import GRADIENTS, LOGITS, LOSSES, NORMS
from star_jax.verify.rules import Rule, inputs

Model = TypeVar('Model', bound=Family)
Rows = tuple[int, ...]
TEXT = r'encoder_(?:hidden_states|attention_mask|pool_feat)'
MODE = '(as_released|per_sample)'
RELEASED = {'as_released': True, 'released': True, 'per_sample': False, 'corrected': False}


class TeacherForced:
    """Logits, hidden states, losses and gradients under teacher forcing."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.star = cases.star_config(case)
        self.params = cases.star_params(case, self.star)
        self.forward = functools.cache(self._forward)
        self.blocks = functools.cache(self._blocks)
        self.sample = functools.cache(self._sample)

    def rules(self) -> tuple[Rule, ...]:
        return (
            inputs('gt_idx|x_BLCv_wo_first_l|keep_mask'),
            inputs(TEXT),
            Rule(f'logits_{MODE}', LOGITS, lambda mode: self.forward(mode)[2]),
            Rule(f'features_{MODE}', LOGITS, lambda mode: self.forward(mode)[1]),
            Rule(f'block_input_{MODE}', LOGITS, lambda mode: self.forward(mode)[0]),
            Rule(rf'block(\d+)_out_{MODE}', LOGITS, self.block_out),
            Rule(f'loss_{MODE}_batch_mean', LOSSES, lambda mode: self.losses(mode).mean()),
            Rule(f'loss_{MODE}', LOSSES, self.losses),
            Rule(r'sample(\d+)_loss', LOSSES, lambda b: self.sample(int(b))[0]),
            Rule(r'sample(\d+)_grad_norm', NORMS, lambda b: self.sample(int(b))[1]),
            Rule(r'sample(\d+)_grad\.(.+)', GRADIENTS, lambda b, n: self.sample(int(b))[2][n]),
        )

    @functools.cached_property
    def rows(self) -> Rows:
        """The rows that are computed: all, or those of `keep_mask` in a case that drops tokens."""
        schedule = self.star.schedule
        if not self.case.optional('token_dropping'):
            if 'keep_mask' in self.case.arrays:
                raise UserError(f'{self.case.path}: a case with a keep_mask needs token_dropping')
            return tuple(range(schedule.length))
        kept = np.flatnonzero(self.case.input('keep_mask'))
        dropped = np.setdiff1d(np.arange(schedule.length), kept)
        dropping = functools.partial(self.case.option, 'token_dropping')
        if len(kept) != dropping('drop_scale_length') or np.any(
            dropped < schedule.starts[dropping('drop_start_idx')]
        ):
            raise UserError(f'{self.case.path}: token_dropping describes another keep_mask')
        return tuple(kept.tolist())

    @property
    def codes_BL(self) -> np.ndarray:
        return self.case.input('gt_idx')[:, self.rows]

    @property
    def inputs(self) -> np.ndarray:
        return self.case.input('x_BLCv_wo_first_l')

    @functools.cached_property
    def text(self) -> TextCondition:
        return text_of(self.case)

    def _forward(self, mode: str) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Input of the first block, features, logits."""
        forward = forward_fn(with_cross_attention(self.star, mode), self.rows)
        return forward(self.params, self.inputs, self.text)

    def _blocks(self, mode: str) -> list[jax.Array]:
        """The output of each block, computed by networks of one layer."""
        x_BLD, outputs = self.forward(mode)[0], []
        star = dataclasses.replace(with_cross_attention(self.star, mode), refinement=None)
        for layer in range(self.star.depth):
            config, params = one_layer(star, self.params, layer)
            x_BLD = layer_fn(config, self.rows)(params, x_BLD, self.text)
            outputs.append(x_BLD)
        return outputs

    def block_out(self, block: str, mode: str) -> jax.Array:
        return self.blocks(mode)[int(block)]

    def losses(self, mode: str) -> jax.Array:
        nll_BL = Index(self.star.codes).nll(self.forward(mode)[2], self.codes_BL)
        return nll_BL.mean(-1)

    def _sample(self, index: int) -> tuple[jax.Array, jax.Array, dict[str, np.ndarray]]:
        """Loss, gradient norm and gradients, in the original names, of one sample alone."""
        if index >= len(self.codes_BL):
            raise LookupError(f'sample {index}')
        row = slice(index, index + 1)
        text = jax.tree.map(lambda x: x[row], self.text)
        differentiate = gradient_fn(self.star, self.rows)
        loss, gradients = differentiate(self.params, self.inputs[row], text, self.codes_BL[row])
        state = to_state(star_entries(self.star), gradients)
        return loss, optax.tree.norm(gradients), state


def text_of(case: Case, prefix: str = '') -> TextCondition:
    """The recorded text features."""
    names = ('hidden_states', 'attention_mask', 'pool_feat')
    return TextCondition(*(case.input(f'{prefix}encoder_{name}') for name in names))


def with_cross_attention(star: Star, mode: str) -> Star:
    """The model with the cross-attention mode of a recording.

    Raises:
        ValueError: the mode is unknown.
    """
    if mode not in RELEASED:
        raise ValueError(f'cross_attention must be one of {", ".join(RELEASED)}, not {mode!r}')
    return dataclasses.replace(star, released_cross_attention=RELEASED[mode])


def one_layer(config: Model, params: dict, layer: int) -> tuple[Model, dict]:
    """Config and parameters of a network that has only layer `layer` of the given one."""
    block = jax.tree.map(lambda stacked: stacked[layer : layer + 1], params['blocks'])
    return dataclasses.replace(config, depth=1), params | {'blocks': block}


def mean_nll(
    config: Family,
    rows: Rows,
    params: dict,
    inputs: np.ndarray,
    condition: Condition,
    codes_BL: np.ndarray,
    smoothing: float = 0.0,
) -> jax.Array:
    """The training loss on recorded inputs and codes of `rows`, with label smoothing."""
    logits_BLV = _forward(config, rows, params, inputs, condition)[2]
    return Index(config.codes).nll(logits_BLV, codes_BL, smoothing).mean()


def _forward(
    config: Family, rows: Rows, params: dict, inputs: np.ndarray, condition: Condition
) -> tuple[jax.Array, jax.Array, jax.Array]:
    network = bind(config.build(), params)
    later = np.arange(config.schedule.starts[1], config.schedule.starts[-1])
    x_BLD = jnp.concatenate([network.start(condition), network.embed(inputs, later)], axis=1)
    features_BLD = network.features(inputs, condition, np.asarray(rows))
    return x_BLD[:, np.asarray(rows)], features_BLD, network.head(features_BLD, condition)


@functools.cache
def forward_fn(config: Family, rows: Rows) -> Callable:
    """(params, inputs, condition) -> (input of the first block, features, logits), jitted."""
    return jax.jit(functools.partial(_forward, config, rows))


@functools.cache
def gradient_fn(config: Family, rows: Rows) -> Callable:
    """(params, inputs, condition, codes) -> (loss, gradients of the parameters), jitted."""
    return jax.jit(jax.value_and_grad(functools.partial(mean_nll, config, rows)))


@functools.cache
def layer_fn(config: Family, rows: Rows) -> Callable:
    """(params, x_BLD, condition) -> x_BLD after a network of one layer, jitted."""

    def run(params, x_BLD, condition):
        network = bind(config.build(), params)
        positions = np.asarray(rows)
        text_kv = network.text_kv(condition)
        visibility = config.schedule.visibility(positions)
        features_BLD, _ = network.trunk(
            x_BLD,
            positions,
            text_kv=text_kv,
            condition=condition,
            visibility=Visibility(bounds=visibility),
        )
        return features_BLD

    return jax.jit(run)
