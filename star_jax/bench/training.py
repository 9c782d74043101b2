"""How long does a training step take?

The step of a transformer, on random codes and text features, over the devices of the run's mesh.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from star_jax.bench import timing
from star_jax.bench.benchmark import Args, Benchmark, TimedProgram, random_arrays
from star_jax.bench.sampling import condition
from star_jax.core.flops import count_flops
from star_jax.errors import UserError
from star_jax.parallel import rules
from star_jax.parallel.rules import device_bytes
from star_jax.plan.jaxpr_memory import weights_read
from star_jax.training import summary
from star_jax.training.build import COUNTED, build_program, init_params
from star_jax.training.program import Frozen, StepInputs, TrainingProgram, step_keys
from star_jax.training.run import Run
from star_jax.training.state import init_sharded


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """A run whose training step is timed, with random weights, codes and text features.

    Attributes:
        run: the settings.
        repeats: timed steps.
        text_tokens: tokens of a caption.
    """

    run: Run
    repeats: int = 10
    text_tokens: int = 77

    def __post_init__(self) -> None:
        if min(self.repeats, self.text_tokens) < 1:
            raise UserError(
                'repeats and text_tokens must be at least 1, not '
                f'{self.repeats} and {self.text_tokens}'
            )
        timing.check_runs('repeats', self.repeats)

    @property
    def dtype(self) -> str:
        return self.run.dtype

    def prepare(self) -> Benchmark:
        """The programs and their arguments, on the devices of the run's mesh."""
        run, mesh = self.run, self.run.mesh.build()
        vq = run.model.default_tokenizer()
        summary.check_batch(run.batch, vq.resolution, mesh)

        def build(**changes: Any) -> TrainingProgram:
            changed = dataclasses.replace(run, **changes)
            tokenizer = vq.build_training(run.correction)
            return build_program(changed, mesh, tokenizer, platform=jax.default_backend())

        program, counted = build(), build(**COUNTED)
        state = init_sharded(
            program.start,
            lambda key: program.trained(init_params(run, key)),
            mesh,
            jax.random.key(run.seed),
        )
        base = nn.unbox(program.base(run.model.abstract()))
        frozen = Frozen(
            tokenizer=random_arrays(nn.unbox(vq.abstract())),
            empty=condition(run.model, 1, self.text_tokens),
            base=random_arrays(base) if base else None,
        )
        frozen = jax.device_put(frozen, rules.replicated(mesh))
        encoded = program.abstract_encoded(frozen.tokenizer, run.batch)
        batch = StepInputs(
            encoded=_random_encoded(encoded, run.model.vocabulary.num_codes),
            prompts=condition(run.model, run.batch, self.text_tokens),
        )
        batch = jax.device_put(batch, rules.batch_sharding(mesh))
        accumulate = run.optimizer.accumulate
        args = (state, frozen, (batch,) * accumulate, step_keys(jax.random.key(0), 0, accumulate))
        copies = mesh.size // mesh.shape['tensor']  # copies of the gathered parameters
        state_bytes, shapes = mesh.size * device_bytes(state), jax.eval_shape(lambda: args)

        def cost(step: Callable[..., Any]) -> tuple[int, int]:
            return count_flops(step, *shapes), copies * weights_read(*_by_params(step, shapes))

        def cost_of_update() -> tuple[int, int]:
            flops, reads = cost(counted.train)
            return flops, reads + state_bytes

        return Benchmark(
            main=TimedProgram(jax.jit(program.train, donate_argnums=0), args, cost_of_update),
            parts={
                'forward': TimedProgram(
                    jax.jit(program.forward), None, functools.partial(cost, counted.forward)
                )
            },
            remainder='backward and update',
            weights=jax.eval_shape(lambda state: state.params, state),
            images=accumulate * run.batch,
            pixels=max(vq.resolution),
            next_args=_next_args,
        )


def _by_params(program: Callable[..., Any], args: Args) -> tuple[Any, ...]:
    """The same program with the trained parameters as its first argument, and its arguments."""

    def run(params: Any, state: Any, *others: Any) -> Any:
        return program(state.replace(params=params), *others)

    return run, args[0].params, *args


def _random_encoded(abstract: jax.ShapeDtypeStruct, num_codes: int) -> np.ndarray:
    """Random codes, or random features for tokenizers that encode images to features."""
    random = np.random.default_rng(0)
    if np.issubdtype(abstract.dtype, np.integer):
        return random.integers(0, num_codes, abstract.shape, abstract.dtype)
    return random.standard_normal(abstract.shape, np.float32).astype(abstract.dtype)


def _next_args(args: Args, result: Any) -> Args:
    return (result[0], *args[1:])
