"""How are recorded generations of Infinity computed? (kind `generate`)

The library's sampler runs with its trace, which holds the recorded arrays.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from star_jax.convert.bsq import IGNORED, bsq_entries
from star_jax.core import condition
from star_jax.core.filters import BitFilter
from star_jax.core.guidance import StepSettings, layer_mixing
from star_jax.families.infinity import Infinity
from star_jax.nn.bind import bind
from star_jax.sampling.methods import FilteredSampling
from star_jax.sampling.program import of_steps
from star_jax.sampling.sampler import GivenCodes, Sample, StepTrace, sample
from star_jax.tokenizers.residual_bsq import BSQ
from star_jax.verify import cases
from star_jax.verify.cases import Case
from star_jax.verify.comparison import ACTIVATIONS, BYTES, GENERATED, INTEGERS, TOKENIZED
from star_jax.verify.infinity import named
from star_jax.verify.infinity_tokenizer import to_recorded, tokenizer_config
from star_jax.verify.infinity_train import NETWORK, TOKENIZER, state_of
from star_jax.verify.infinity_transformer import TEXT, infinity_config, infinity_params, text_of
from star_jax.verify.rules import Rule, inputs

RUN, SCALE = '([^/]+)', r'/s(\d+)'
ON_LOGITS = 0  # in `cfg_insertion_layer`; layers are negative numbers


class BitGenerations:
    """The runs that the config lists.

    The bits of runs that sample are fed back. Where first scales are given, the recorded bits are
    those that the model prefers.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        option = case.option
        patchify = bool(option('apply_spatial_patchify'))
        self.bsq = tokenizer_config(case, option('vae'), option('schedule'), patchify)
        self.infinity = infinity_config(
            case,
            bits=self.bsq.vector_width,
            schedule=option('schedule'),
            reference=option('schedule'),
        )
        state = state_of(case, TOKENIZER)
        self.params = {
            'model': infinity_params(case, self.infinity, state_of(case, NETWORK)),
            'tokenizer': cases.convert(case, bsq_entries(self.bsq, state), state, IGNORED),
        }
        self.run = functools.cache(self._run)
        self.traces = functools.cache(lambda name: self.run(name).trace.steps())

    def rules(self) -> tuple[Rule, ...]:
        return (
            inputs(TEXT),
            inputs(rf'{RUN}/in/leaked_bits/s\d+'),
            Rule(f'{RUN}/mid/sos', ACTIVATIONS, self.pooled),
            Rule(f'{RUN}/out/logits{SCALE}', GENERATED, self.logits),
            Rule(f'{RUN}/out/bits{SCALE}', INTEGERS, self.bits),
            Rule(f'{RUN}/out/filtered_probs{SCALE}', GENERATED, self.probs),
            Rule(f'{RUN}/mid/next_input{SCALE}', TOKENIZED, self.next_inputs),
            Rule(f'{RUN}/out/summed_codes', TOKENIZED, self.canvas),
            Rule(f'{RUN}/out/image', TOKENIZED, lambda run: to_recorded(self.run(run).images)),
            Rule(f'{RUN}/out/image_u8_bgr_nhwc', BYTES, self.bytes),
        )

    def trace(self, run: str, scale: str) -> StepTrace:
        return self.traces(run)[int(scale)]

    def logits(self, run: str, scale: str) -> np.ndarray:
        """Flat logits after guidance and temperature."""
        taus = self.per_scale(named(self.case, 'runs', 'name', run)['tau_list'])
        return _flat(self.trace(run, scale).method.guided) / taus[int(scale)]

    def bits(self, run: str, scale: str) -> np.ndarray:
        """The most probable bits; of a run that samples, the recorded ones that may be sampled."""
        trace = self.trace(run, scale)
        if named(self.case, 'runs', 'name', run)['top_k'] == 1:
            return np.asarray(trace.sampled)
        recorded = self.case.input(f'{run}/out/bits/s{scale}')
        probs = np.take_along_axis(np.asarray(trace.method.probs), recorded[..., None], -1)
        return np.where(probs[..., 0] > 0, recorded, 1 - recorded)

    def probs(self, run: str, scale: str) -> np.ndarray:
        return _flat(self.trace(run, scale).method.probs)

    def next_inputs(self, run: str, scale: str) -> jax.Array:
        if scale == '0':
            raise LookupError('the first scale has no inputs')
        return self.traces(run)[int(scale) - 1].inputs

    def canvas(self, run: str) -> np.ndarray:
        return to_recorded(self.traces(run)[-1].canvas)

    def bytes(self, run: str) -> np.ndarray:
        """Bytes in the recorded order of channels, blue first."""
        tokenizer = self.bsq.build()
        return np.asarray(tokenizer.to_uint8(self.run(run).images))[..., ::-1]

    def pooled(self, run: str) -> jax.Array:
        """The pooled text of all rows."""
        rows = self.rows(named(self.case, 'runs', 'name', run))
        return _pool_fn(self.infinity)(self.params['model'], rows)

    def per_scale(self, values: Any) -> np.ndarray:
        """[S] float32 from a list or a number for all scales."""
        return np.broadcast_to(np.float32(values), self.infinity.schedule.steps)

    def weights(self, run: Mapping[str, Any]) -> np.ndarray:
        """[S] float32 weights of guidance."""
        return of_steps(self.infinity.guidance_weights, self.per_scale(run['cfg_list']).tolist())

    def rows(self, run: Mapping[str, Any]) -> Any:
        """The conditions of all rows of a run."""
        text = text_of(self.case, 'in/')
        if not np.any(self.weights(run)):
            return text
        if run.get('negative'):
            return condition.stack(text, text_of(self.case, 'in/neg_'))
        return condition.stack(text, _unprompted_fn(self.infinity)(self.params['model'], text))

    def settings(self, run: Mapping[str, Any]) -> StepSettings:
        weights_S, places = self.weights(run), run.get('cfg_insertion_layer', [ON_LOGITS])
        layers = tuple(place for place in places if place < 0)
        on_logits = weights_S if ON_LOGITS in places else np.zeros_like(weights_S)
        mixing = layer_mixing(weights_S, self.infinity.depth, layers)
        guided = bool(np.any(weights_S))
        return StepSettings(on_logits, self.per_scale(run['tau_list']), mixing if guided else None)

    def given(self, name: str, run: Mapping[str, Any]) -> GivenCodes:
        """The recorded bits of scales that are given, or of all where a run samples."""
        schedule, codes = self.infinity.schedule, {}
        stop = min(run.get('trunk_scale') or schedule.steps, schedule.steps)
        if run['top_k'] != 1:
            for step in range(stop):
                codes[step] = self.case.input(f'{name}/out/bits/s{step}')
        for step in range(min(run.get('gt_leak', 0), stop)):
            maps = self.case.input(f'{name}/in/leaked_bits/s{step}')[:, 0]
            codes[step] = bind(self.bsq.build(), {}).tokens((maps,))
        if codes:
            return GivenCodes.of_steps(codes, schedule, self.infinity.vocabulary)
        batch = len(self.case.input('in/text_lens'))
        shape = (batch, schedule.length, self.infinity.bits)
        return GivenCodes(np.zeros(shape, np.int32), np.zeros(schedule.steps, bool))

    def _run(self, name: str) -> Sample:
        """Images, codes and the trace of a run."""
        run = named(self.case, 'runs', 'name', name)
        batch = len(self.case.input('in/text_lens'))
        return _sample_fn(self.infinity, self.bsq, run.get('trunk_scale', 0))(
            self.params,
            keys_B=jax.random.split(jax.random.key(0), batch),
            condition=self.rows(run),
            settings=self.settings(run),
            method=FilteredSampling(
                BitFilter(top_k=run['top_k'], top_p=run['top_p'] or None), greedy=True
            ),
            given=self.given(name, run),
        )


def _flat(x_BLD2: jax.Array) -> np.ndarray:
    x = np.asarray(x_BLD2)
    return x.reshape(*x.shape[:2], -1)


@functools.cache
def _sample_fn(infinity: Infinity, bsq: BSQ, stop: int) -> Callable:
    """The sampling program of the first `stop` scales (0: all), with its trace, jitted."""
    run = functools.partial(sample, infinity.build(), bsq.build(), trace=True, stop=stop)
    return jax.jit(run)


@functools.cache
def _unprompted_fn(infinity: Infinity) -> Callable:
    return jax.jit(lambda params, text: bind(infinity.build(), params).unprompted(text, text))


@functools.cache
def _pool_fn(infinity: Infinity) -> Callable:
    return jax.jit(lambda params, text: bind(infinity.build(), params).starter.summary(text))
