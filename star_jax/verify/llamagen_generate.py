"""How are recorded generations of LlamaGen computed? (kinds `c2i_generate`, `t2i_generate`)

The library's sampler runs with its trace, which holds the recorded arrays.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from star_jax.core import condition
from star_jax.core.codes import Index, Sampled
from star_jax.core.condition import LabelCondition, TextCondition
from star_jax.core.guidance import StepSettings
from star_jax.core.schedule import Raster, Step
from star_jax.errors import UserError
from star_jax.families.llamagen import Llama
from star_jax.nn.bind import bind
from star_jax.sampling import weight_layout
from star_jax.sampling.methods import FilteredSampling
from star_jax.sampling.sampler import GivenCodes, Sample, sample
from star_jax.verify.cases import Case
from star_jax.verify.comparison import GUIDED_LOGITS, HIDDEN, INTEGERS, LOGITS
from star_jax.verify.infinity import named
from star_jax.verify.llamagen import recorded_filter
from star_jax.verify.llamagen_transformer import (
    aligned,
    class_config,
    llamagen_params,
    padding,
    text_condition,
    text_config,
)
from star_jax.verify.options import check_value
from star_jax.verify.rules import Rule, inputs

TAG = '([^.]+)'
CACHE_UNIT = 8  # the recorded caches are as long as its next multiple


class RasterGenerations:
    """The runs that the config lists; subclasses give the conditions.

    Attributes:
        case: the case.
        model: the config of its transformer.
        params: its parameters.
    """

    model: Llama

    def __init__(self, case: Case) -> None:
        self.case = case
        self.params = llamagen_params(case, self.model)
        self.run = functools.cache(self._run)
        check_value(case.path, 'prefix_length', case.option('prefix_length'), self.model.prefix)
        sampled, tokens = case.option('max_new_tokens'), self.model.schedule.steps
        if not 1 <= sampled <= tokens:
            raise UserError(f'{case.path}: max_new_tokens must lie in 1 to {tokens}, not {sampled}')

    def rules(self) -> tuple[Rule, ...]:
        return (
            Rule(f'tokens.{TAG}', INTEGERS, self.tokens),
            Rule(f'logits.{TAG}', GUIDED_LOGITS, lambda tag: self.traced(tag, 'guided')),
            Rule(f'raw_logits.{TAG}', LOGITS, lambda tag: self.traced(tag, 'logits')),
            Rule(rf'([kv])_cache_(\d+)\.{TAG}', HIDDEN, self.cache),
        )

    def setting(self, tag: str) -> Mapping[str, Any]:
        return named(self.case, 'settings', 'tag', tag)

    def condition(self, tag: str) -> Any:
        """The conditions of the prompted rows."""
        raise NotImplementedError

    @property
    def empty(self) -> Any:
        """The encoded empty prompt, one row."""
        raise NotImplementedError

    def tokens(self, tag: str) -> np.ndarray:
        """The most probable tokens; of a run that samples, the recorded ones that it may sample."""
        steps = self.run(tag).trace.steps()
        if self.case.option('top_k') == 1:
            return np.concatenate([step.sampled for step in steps], axis=1)
        recorded = self.case.input(f'tokens.{tag}')
        probs = np.concatenate([step.method.probs for step in steps], axis=1)
        allowed = np.take_along_axis(probs, recorded[..., None], -1)[..., 0] > 0
        return np.where(allowed, recorded, -1)

    def traced(self, tag: str, name: str) -> np.ndarray:
        """[B or 2B, N, V] logits."""
        steps = self.run(tag).trace.steps()
        return np.concatenate([getattr(step.method, name) for step in steps], axis=1)

    def cache(self, which: str, layer: str, tag: str) -> np.ndarray:
        """[2B, H, rows, h] of a layer, filled up with zeros."""
        if not self.setting(tag).get('cache'):
            raise LookupError(f'the run {tag} has no cache')
        kv = self.run(tag).trace.cache
        array = np.asarray((kv.keys if which == 'k' else kv.values)[int(layer)])
        rows = self.model.prefix + self.case.option('max_new_tokens')
        missing = -(-rows // CACHE_UNIT) * CACHE_UNIT - array.shape[2]
        return np.pad(array, ((0, 0), (0, 0), (0, missing), (0, 0)))

    def settings(self, tag: str) -> StepSettings:
        """Guidance of the first steps, or of all (LlamaGen specification 3.1)."""
        setting = self.setting(tag)
        weights_S = self.model.guidance_weights(setting['cfg_scale'])
        interval = setting.get('cfg_interval', -1)
        if interval > -1:
            weights_S[interval + 2 :] = 0
        return StepSettings(weights_S, self.model.temperatures(self.case.option('temperature')))

    @functools.cached_property
    def arranged(self) -> dict[str, Any]:
        """The parameters as the sampler that users run reads them."""
        params = {'model': self.params, 'tokenizer': {}}
        return weight_layout.arrange(params, self.model.schedule, jax.default_backend())

    def _run(self, tag: str) -> Sample:
        option, model = self.case.option, self.model
        rows = self.condition(tag)
        batch = len(jax.tree.leaves(rows)[0])
        if self.setting(tag)['cfg_scale'] > 1:
            rows = _both_fn(model)(self.params, rows, self.empty)
        keep = recorded_filter({name: option(name) for name in ('top_k', 'top_p')})
        given = None
        if option('top_k') != 1:
            recorded = self.case.input(f'tokens.{tag}')
            given = GivenCodes.of_steps(
                {step: recorded[:, step : step + 1] for step in range(recorded.shape[1])},
                model.schedule,
                model.vocabulary,
            )
        return _sample_fn(model, option('max_new_tokens'))(
            self.arranged,
            keys_B=jax.random.split(jax.random.key(0), batch),
            condition=rows,
            settings=self.settings(tag),
            method=FilteredSampling(keep, greedy=True),
            given=given,
        )


class ClassGenerations(RasterGenerations):
    """Images of classes."""

    def __init__(self, case: Case) -> None:
        self.model = class_config(case)
        super().__init__(case)

    def rules(self) -> tuple[Rule, ...]:
        return (inputs('labels'), *super().rules())

    def condition(self, tag: str) -> LabelCondition:
        return LabelCondition(self.case.input('labels').astype(np.int32))

    @property
    def empty(self) -> LabelCondition:
        return LabelCondition(np.array([self.model.classes], np.int32))


class TextGenerations(RasterGenerations):
    """Images of prompts, as a text encoder gives them."""

    def __init__(self, case: Case) -> None:
        self.model = text_config(case)
        super().__init__(case)

    def rules(self) -> tuple[Rule, ...]:
        return (
            inputs(r't5_(?:embs|mask)_right_padded'),
            Rule('cond', HIDDEN, lambda: aligned(self.model, self.params, self.text)),
            Rule('emb_masks', INTEGERS, self.mask),
            *super().rules(),
        )

    @functools.cached_property
    def text(self) -> TextCondition:
        """The prompts, without their padding."""
        states_BTE = self.case.input('t5_embs_right_padded')
        lengths = self.case.input('t5_mask_right_padded').sum(1)
        texts = [x[:length] for x, length in zip(states_BTE, lengths, strict=True)]
        return text_condition(texts, np.ones(len(texts), bool), self.model)

    def mask(self) -> np.ndarray:
        padding_B = padding(self.model, self.params, self.text)
        return np.arange(self.model.prefix) >= padding_B[:, None]

    def condition(self, tag: str) -> TextCondition:
        """The prompts at the end of the prefix, with their mask or without any."""
        states_BTE = aligned(self.model, self.params, self.text)
        mask_BT = self.mask().astype(np.int32)
        if not self.setting(tag).get('use_mask', True):
            mask_BT = np.ones_like(mask_BT)
        return TextCondition(states_BTE, mask_BT, np.zeros_like(states_BTE[:, 0]))

    @property
    def empty(self) -> TextCondition:
        return jax.tree.map(lambda x: x[:1], self.text)


class CodesAlone(nn.Module):
    """A tokenizer without images: its canvas is the array of codes.

    Attributes:
        schedule: steps of an image.
        codes: the codes of a token.
    """

    schedule: Raster
    codes: Index

    def embed(self, codes_BL: jax.Array) -> jax.Array:
        return jnp.zeros((*codes_BL.shape, 1))

    def blank(self, batch: int) -> jax.Array:
        return jnp.zeros((batch, self.schedule.length), jnp.int32)

    def advance(
        self, canvas: jax.Array, sampled: Sampled, step: Step
    ) -> tuple[jax.Array, jax.Array | None]:
        canvas = jax.lax.dynamic_update_slice_in_dim(canvas, sampled.codes_BL, step.index, axis=1)
        last = step.like + 1 == self.schedule.steps
        return canvas, None if last else sampled.codes_BL

    def decode(self, canvas: jax.Array) -> jax.Array:
        return canvas


@functools.cache
def _sample_fn(model: Llama, stop: int) -> Callable:
    """The sampling program of the first `stop` tokens, with its trace, jitted."""
    tokenizer = CodesAlone(model.schedule, model.vocabulary)
    network = model.build()

    def run(params: dict, **inputs: Any) -> Sample:
        return sample(network, tokenizer, params, trace=True, stop=stop, **inputs)

    return jax.jit(run)


@functools.cache
def _both_fn(model: Llama) -> Callable:
    """(params, condition, empty) -> prompted over unprompted rows, jitted."""

    def stack(params: dict, rows: Any, empty: Any) -> Any:
        unprompted = bind(model.build(), params).unprompted(rows, empty)
        return condition.stack(rows, unprompted)

    return jax.jit(stack)
