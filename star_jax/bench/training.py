"""How long does a training step take?

The step of a transformer, on random codes and text features, over the devices of the run's mesh.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from star_jax.bench.benchmark import Args, Benchmark, TimedProgram, random_arrays
from star_jax.bench.sampling import condition
from star_jax.core.flops import count_flops
from star_jax.parallel import rules
from star_jax.protocols import TokenizerConfig
from star_jax.training import summary
from star_jax.training.programs import Programs
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
            raise ValueError(
                'repeats and text_tokens must be at least 1, not '
                f'{self.repeats} and {self.text_tokens}'
            )

    @property
    def dtype(self) -> str:
        return self.run.dtype

    def prepare(self) -> Benchmark:
        """The programs and their arguments, on the devices of the run's mesh."""
        run, mesh = self.run, self.run.mesh.build()
        vq = run.model.default_tokenizer()
        summary.check_batch(run.batch, vq.resolution, mesh)
        programs = self._programs(run, mesh, vq)
        state = init_sharded(programs.build, mesh, jax.random.key(run.seed))
        frozen = {
            'tokenizer': random_arrays(nn.unbox(vq.abstract())),
            'empty': condition(run.model, 1, self.text_tokens),
        }
        frozen = jax.device_put(frozen, rules.replicated(mesh))
        shape = (run.batch, run.model.schedule.length)
        codes_BL = np.random.default_rng(0).integers(0, run.model.codes, shape, np.int32)
        batch = {'codes': codes_BL, 'text': condition(run.model, run.batch, self.text_tokens)}
        batch = jax.device_put(batch, rules.batch_sharding(mesh))
        args = (state, frozen, batch, jax.random.key(0))
        # Operations that remat repeats count once, and those inside of kernels count, too.
        counted = programs.plain
        return Benchmark(
            main=TimedProgram(
                jax.jit(programs.train, donate_argnums=0), args, count_flops(counted.train, *args)
            ),
            parts={
                'forward': TimedProgram(
                    jax.jit(_forward(programs)), None, count_flops(_forward(counted), *args)
                )
            },
            remainder='backward and update',
            weights=jax.eval_shape(lambda state: state.params, state),
            images=run.batch,
            pixels=max(vq.resolution),
            next_args=_next_args,
        )

    def _programs(self, run: Run, mesh: Mesh, vq: TokenizerConfig) -> Programs:
        platform = jax.default_backend()
        return Programs(run, mesh, vq, None, inside=False, platform=platform)


def _forward(programs: Programs) -> Callable[..., Any]:
    """The loss at the state before a step, with the arguments of the step."""

    def forward(state: Any, frozen: Any, batch: Any, key: jax.Array) -> Any:
        return programs.score(state.params, frozen, batch)

    return forward


def _next_args(args: Args, result: Any) -> Args:
    return (result[0], *args[1:])
