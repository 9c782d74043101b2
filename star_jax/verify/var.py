"""How are the recorded arrays of a class-conditional transformer computed? (kind `var`)"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from star_jax.convert.entries import to_state
from star_jax.convert.var import var_entries
from star_jax.core.condition import LabelCondition
from star_jax.core.filters import NucleusFilter
from star_jax.sampling.methods import FilteredSampling
from star_jax.sampling.sampler import Sample, StepTrace
from star_jax.verify import cases
from star_jax.verify.cases import Case
from star_jax.verify.comparison import GRADIENTS, INTEGERS, LATENTS, LOGITS, LOSSES, NORMS
from star_jax.verify.generate import next_inputs_map, sample_greedily, split_codes
from star_jax.verify.rules import Rule, inputs
from star_jax.verify.star import forward_fn, gradient_fn, layer_fn, one_layer
from star_jax.verify.tokenizer import to_nchw


class ClassConditional:
    """Teacher forcing with and without labels, gradients, and one generation."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.var = cases.var_config(case)
        self.params = cases.var_params(case, self.var)
        self.rows = tuple(range(self.var.schedule.length))
        self.forward = functools.cache(self._forward)

    def rules(self) -> tuple[Rule, ...]:
        return (
            inputs('gt_idx|x_BLCv_wo_first_l|labels'),
            Rule('logits', LOGITS, lambda: self.forward(self.labels)[2]),
            Rule('logits_unconditional', LOGITS, lambda: self.forward(self.no_labels)[2]),
            Rule('features', LOGITS, lambda: self.forward(self.labels)[1]),
            Rule('block_input', LOGITS, lambda: self.forward(self.labels)[0]),
            Rule(r'block(\d+)_out', LOGITS, lambda block: self.blocks[int(block)]),
            Rule('loss', LOSSES, lambda: self.differentiated[0]),
            Rule('grad_norm', NORMS, lambda: self.differentiated[1]),
            Rule(r'grad\.(.+)', GRADIENTS, lambda name: self.differentiated[2][name]),
            Rule(r'generate\.idx_(\d+)', INTEGERS, lambda step: self.codes[int(step)]),
            Rule(r'generate\.logits_(\d+)', LOGITS, lambda step: self.trace(step).method.guided),
            Rule(r'generate\.fhat_(\d+)', LATENTS, lambda step: to_nchw(self.trace(step).canvas)),
            Rule(r'generate\.next_token_map_(\d+)', LATENTS, self.next_map),
            Rule(r'generate\.image', LATENTS, lambda: to_nchw(self.generated.images + 1) / 2),
        )

    @property
    def labels(self) -> tuple[int, ...]:
        return tuple(self.case.input('labels').tolist())

    @property
    def no_labels(self) -> tuple[int, ...]:
        """The label of the unprompted condition, once per image."""
        return (self.var.classes,) * len(self.labels)

    @property
    def inputs(self) -> np.ndarray:
        return self.case.input('x_BLCv_wo_first_l')

    def _forward(self, labels: tuple[int, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Input of the first block, features, logits."""
        return forward_fn(self.var, self.rows)(self.params, self.inputs, _condition(labels))

    @functools.cached_property
    def blocks(self) -> list[jax.Array]:
        """The output of each block, computed by networks of one layer."""
        x_BLD, outputs = self.forward(self.labels)[0], []
        condition = _condition(self.labels)
        for layer in range(self.var.depth):
            config, params = one_layer(self.var, self.params, layer)
            x_BLD = layer_fn(config, self.rows)(params, x_BLD, condition)
            outputs.append(x_BLD)
        return outputs

    @functools.cached_property
    def differentiated(self) -> tuple[jax.Array, jax.Array, dict[str, np.ndarray]]:
        """Loss, gradient norm and gradients, in the original names, of the batch."""
        differentiate = gradient_fn(self.var, self.rows)
        codes_BL, condition = self.case.input('gt_idx'), _condition(self.labels)
        loss, gradients = differentiate(self.params, self.inputs, condition, codes_BL)
        return loss, optax.tree.norm(gradients), to_state(var_entries(self.var), gradients)

    @functools.cached_property
    def generated(self) -> Sample:
        option = self.case.option
        vq, tokenizer = self.case.tokenizer
        params = {'model': self.params, 'tokenizer': tokenizer}
        keep = NucleusFilter(top_k=option('top_k'), top_p=option('top_p') or None)
        return sample_greedily(
            self.var,
            vq,
            params,
            condition=_condition(self.labels + self.no_labels),
            guidance=option('cfg'),
            method=FilteredSampling(keep, greedy=True),
        )

    @functools.cached_property
    def codes(self) -> list[np.ndarray]:
        return split_codes(self.generated, self.var.schedule)

    @functools.cached_property
    def traces(self) -> list[StepTrace]:
        return self.generated.trace.steps()

    def trace(self, step: str) -> StepTrace:
        return self.traces[int(step)]

    def next_map(self, step: str) -> np.ndarray:
        return next_inputs_map(self.trace(step), self.var.sides, int(step))


def _condition(labels: tuple[int, ...]) -> LabelCondition:
    return LabelCondition(ids_B=jnp.asarray(labels, jnp.int32))
