"""How are recorded generations computed? (kind `star_generate`)

The library's sampler runs with its trace, which holds the recorded arrays.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from star_jax.core.filters import NucleusFilter
from star_jax.core.guidance import StepSettings, linear_ramp
from star_jax.core.schedule import Schedule
from star_jax.errors import UserError
from star_jax.protocols import Family, SamplingMethod
from star_jax.sampling.methods import FilteredSampling, SmoothSampling
from star_jax.sampling.sampler import Sample, StepTrace, sample
from star_jax.sampling.stable import VERSIONS
from star_jax.tokenizers.residual_vq import VQ
from star_jax.verify import cases
from star_jax.verify.cases import Case
from star_jax.verify.comparison import INTEGERS, LATENTS, LOGITS
from star_jax.verify.rules import Rule, inputs
from star_jax.verify.star import TEXT, text_of, with_cross_attention
from star_jax.verify.tokenizer import to_nchw

RUN = r'([^.]+)'
OLD = 'old'  # refines like 'new', but earlier scales have overwritten the filters
KNOWN_VERSIONS = VERSIONS | {OLD: VERSIONS['new']}


class Generations:
    """The runs that the config lists."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.star = cases.star_config(case)
        self.vq, tokenizer = case.tokenizer
        self.params = {'model': cases.star_params(case, self.star), 'tokenizer': tokenizer}
        self.run = functools.cache(self._run)
        self.traces = functools.cache(lambda run: self.run(run).trace.steps())

    def rules(self) -> tuple[Rule, ...]:
        return (
            inputs(TEXT),
            Rule(rf'{RUN}\.idx_(\d+)', INTEGERS, lambda run, k: self.codes(run)[int(k)]),
            Rule(rf'{RUN}\.logits_(\d+)', LOGITS, lambda run, k: self.trace(run, k).method.guided),
            Rule(rf'{RUN}\.fhat_(\d+)', LATENTS, lambda run, k: to_nchw(self.trace(run, k).canvas)),
            Rule(rf'{RUN}\.next_token_map_(\d+)', LATENTS, self.next_map),
            Rule(rf'{RUN}\.image', LATENTS, lambda run: to_nchw(self.run(run).images + 1) / 2),
        )

    def codes(self, run: str) -> list[np.ndarray]:
        """The codes of every step."""
        return split_codes(self.run(run), self.star.schedule)

    def trace(self, run: str, step: str) -> StepTrace:
        return self.traces(run)[int(step)]

    def next_map(self, run: str, step: str) -> np.ndarray:
        """The inputs of the next scale as a map; the canvas after the last scale."""
        return next_inputs_map(self.trace(run, step), self.star.sides, int(step))

    def _run(self, name: str) -> Sample:
        """Images, codes and the trace of a run."""
        run = next((run for run in self.case.option('runs') if run.get('name') == name), None)
        if run is None:
            raise LookupError(f'runs holds no {name}')
        rows = np.asarray(run['text_rows'])
        star = with_cross_attention(self.star, run['cross_attention'])
        text = jax.tree.map(lambda x: x[rows], text_of(self.case))
        guidance = self.run_option(run, 'cfg')
        method = self._method(run)
        return sample_greedily(
            star, self.vq, self.params, condition=text, guidance=guidance, method=method
        )

    def _method(self, run: dict[str, Any]) -> SamplingMethod:
        """The sampling method of a run; recorded runs take the most probable codes."""
        if (run['refine'] or self.case.optional('w_mask')) and self.star.refinement:
            raise UserError(
                f'{self.case.folder}: refined runs belong to a case of the kind star_sampler'
            )
        # Without refinement a version changes only filters, which keep the most probable code.
        if self.case.optional('sample_version', 'new') not in KNOWN_VERSIONS:
            raise UserError(
                f'{self.case.path}: sample_version must be one of {", ".join(KNOWN_VERSIONS)}'
            )
        return self._unrefined(run)

    def _unrefined(self, run: dict[str, Any]) -> SamplingMethod:
        option = functools.partial(self.run_option, run)
        if run['draw'] != 'argmax':
            raise UserError(f"{self.case.path}: draw must be 'argmax', not {run['draw']!r}")
        if option('more_smooth', False):
            return SmoothSampling(self.star.schedule.steps, _zero_noise)
        return FilteredSampling(
            NucleusFilter(top_k=option('top_k'), top_p=option('top_p') or None), greedy=True
        )

    def run_option(self, run: dict[str, Any], name: str, *default: Any) -> Any:
        """An option of a run; by default that of the case."""
        if name in run:
            return run[name]
        return self.case.optional(name, *default) if default else self.case.option(name)


@functools.cache
def sample_fn(config: Family, vq: VQ) -> Callable:
    """The jitted sampling program of a model, with its trace."""
    return jax.jit(functools.partial(sample, config.build(), vq.build(), trace=True))


def sample_greedily(
    config: Family,
    vq: VQ,
    params: dict,
    *,
    condition: Any,
    guidance: float,
    method: SamplingMethod,
) -> Sample:
    """Samples from B prompted over B unprompted rows by a method that uses no random numbers."""
    batch = len(jax.tree.leaves(condition)[0]) // 2
    steps = config.schedule.steps
    return sample_fn(config, vq)(
        params,
        keys_B=jax.random.split(jax.random.key(0), batch),
        condition=condition,
        settings=StepSettings(linear_ramp(guidance, steps), np.ones(steps, np.float32)),
        method=method,
    )


def split_codes(sampled: Sample, schedule: Schedule) -> list[np.ndarray]:
    """The codes of every step."""
    return np.split(np.asarray(sampled.codes), schedule.offsets[1:-1], axis=1)


def next_inputs_map(trace: StepTrace, sides: tuple[int, ...], step: int) -> np.ndarray:
    """The inputs of the scale after `step` in the recorded layout; the canvas after the last."""
    if trace.inputs is None:
        return to_nchw(trace.canvas)
    side = sides[step + 1]
    return to_nchw(trace.inputs.reshape(len(trace.inputs), side, side, -1))


def _zero_noise(keys_B: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.zeros((len(keys_B), *shape))
