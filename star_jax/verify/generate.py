"""How are recorded generations computed? (kind `star_generate`)

By the project's one sampler, whose trace returns what a case records.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from star_jax.core.filters import Filter
from star_jax.errors import UserError
from star_jax.families import Family
from star_jax.sampling.methods import (
    FilteredSampling,
    SamplingMethod,
    SmoothSampling,
    choose_largest,
    guidance_ramp,
)
from star_jax.sampling.sampler import Trace, sample
from star_jax.sampling.stable import VERSIONS
from star_jax.tokenizers.residual_vq import VQ
from star_jax.verify import cases
from star_jax.verify.cases import Case
from star_jax.verify.comparison import INTEGERS, LATENTS, LOGITS
from star_jax.verify.rules import Rule, given
from star_jax.verify.star import TEXT, text_of, with_cross_attention
from star_jax.verify.tokenizer import first

RUN = r'([^.]+)'
OLD = 'old'  # a version that refines like 'new', with filters that scales before have overwritten
KNOWN_VERSIONS = VERSIONS | {OLD: VERSIONS['new']}


class Generations:
    """The runs that the config lists."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.star = cases.star_of(case)
        self.vq, tokenizer = case.tokenizer
        self.params = {'model': cases.star_params(case, self.star), 'tokenizer': tokenizer}
        self.run = functools.cache(self._run)

    def rules(self) -> tuple[Rule, ...]:
        return (
            given(TEXT),
            Rule(rf'{RUN}\.idx_(\d+)', INTEGERS, lambda run, k: self.run(run)[1][int(k)]),
            Rule(rf'{RUN}\.logits_(\d+)', LOGITS, lambda run, k: self.trace(run, k).logits_BLV),
            Rule(rf'{RUN}\.fhat_(\d+)', LATENTS, lambda run, k: first(self.trace(run, k).canvas)),
            Rule(rf'{RUN}\.next_token_map_(\d+)', LATENTS, self.next_map),
            Rule(rf'{RUN}\.image', LATENTS, lambda run: first(self.run(run)[0] + 1) / 2),
        )

    def trace(self, run: str, step: str) -> Trace:
        return self.run(run)[2][int(step)]

    def next_map(self, run: str, step: str) -> np.ndarray:
        """The inputs of the next scale as a map; the canvas after the last."""
        return map_of(self.trace(run, step), self.star.sides, int(step))

    def _run(self, name: str) -> tuple[jax.Array, list[jax.Array], list[Trace]]:
        """Images, and codes and traces of every step."""
        run = next((run for run in self.case.option('runs') if run.get('name') == name), None)
        if run is None:
            raise LookupError(f'runs holds no {name}')
        rows = np.asarray(run['text_rows'])
        star = with_cross_attention(self.star, run['cross_attention'])
        text = jax.tree.map(lambda x: x[rows], text_of(self.case))
        keys_B = jax.random.split(jax.random.key(0), len(rows) // 2)  # largest codes need no luck
        guidance_S = guidance_ramp(self.run_option(run, 'cfg'), star.schedule.steps)
        draw = self._draw(run)
        images, codes_BL, traces = sampling(star, self.vq)(
            self.params, keys_B, text, guidance_S, draw
        )
        codes = np.split(np.asarray(codes_BL), star.schedule.offsets[1:-1], axis=1)
        return images, codes, in_order(traces)

    def _draw(self, run: dict[str, Any]) -> SamplingMethod:
        """The draw of a run. Recorded draws take the largest code, so that no noise enters."""
        if (run['refine'] or self.case.optional('w_mask')) and self.star.refinement:
            raise UserError(
                f'{self.case.folder}: refined runs belong to a case of the kind star_sampler'
            )
        # Without refinement a version changes filters alone, which keep the largest code.
        if self.case.optional('sample_version', 'new') not in KNOWN_VERSIONS:
            raise UserError(
                f'{self.case.path}: sample_version must be one of {", ".join(KNOWN_VERSIONS)}'
            )
        return self._unrefined(run)

    def _unrefined(self, run: dict[str, Any]) -> SamplingMethod:
        option = functools.partial(self.run_option, run)
        if run['draw'] != 'argmax':
            raise UserError(f"{self.case.folder}: a run must draw 'argmax', not {run['draw']!r}")
        if option('more_smooth', False):
            return SmoothSampling(len(self.star.sides), _no_noise)
        return FilteredSampling(
            Filter(top_k=option('top_k'), top_p=option('top_p') or None), choose_largest
        )

    def run_option(self, run: dict[str, Any], name: str, *default: Any) -> Any:
        """An option of a run, or that of the whole case."""
        if name in run:
            return run[name]
        return self.case.optional(name, *default) if default else self.case.option(name)


@functools.cache
def sampling(config: Family, vq: VQ) -> Callable:
    """The sampling program of a model, with its trace."""

    def run(params, keys_B, condition, guidance_S, draw):
        model, tokenizer = config.build(), vq.build()
        return sample(model, tokenizer, params, keys_B, condition, guidance_S, draw, trace=True)

    return jax.jit(run)


def in_order(traces: Sequence[Trace]) -> list[Trace]:
    """The trace of every step, from those of groups of steps."""
    return [one for group in traces for one in _unstack(group)]


def map_of(trace: Trace, sides: tuple[int, ...], step: int) -> np.ndarray:
    """The inputs of the next scale as a map in the recorded layout; the canvas after the last."""
    if trace.inputs is None:
        return first(trace.canvas)
    side = sides[step + 1]
    return first(trace.inputs.reshape(len(trace.inputs), side, side, -1))


def _unstack(group: Trace) -> list[Trace]:
    return [jax.tree.map(lambda x, i=i: x[i], group) for i in range(len(group.canvas))]


def _no_noise(keys_B: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.zeros((len(keys_B), *shape))
