"""Which modules and programs train on the images of one template?

Templates whose steps have equal sizes share the programs of the transformer: their grids are
transposed, and only the positions of the rows differ, which are arguments.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh

from star_jax.console import Console
from star_jax.core.codes import Targets
from star_jax.core.schedule import Pyramid
from star_jax.losses import tokens
from star_jax.nn.positions import PositionTables
from star_jax.parallel import rules
from star_jax.protocols import Family
from star_jax.training.build import build_program
from star_jax.training.program import StepInputs, TrainingProgram
from star_jax.training.run import Run


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedPrograms:
    """The programs of all templates whose steps have equal sizes.

    Attributes:
        names: the templates.
        program: their training program.
        train: its jitted training step.
        score: its jitted losses.
    """

    names: tuple[str, ...]
    program: TrainingProgram
    train: Any
    score: Any

    def compile_train(self, args: tuple) -> None:
        """Compiles the training step for (abstract) arguments; the first process reports it."""
        start = time.monotonic()
        self.train.lower(*args).compile()
        if jax.process_index() == 0:
            Console(stderr=True).print(
                f'compiled the step of {self.program.network.schedule.length:,} tokens for the '
                f'templates {" and ".join(self.names)} in {time.monotonic() - start:.0f} s'
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TemplatePrograms:
    """The modules and programs of one template.

    Attributes:
        name: name of the template.
        schedule: its grids.
        tokenizer: the module at these grids.
        tables: the positions of its rows, on the devices.
        shared: the programs that it shares with the template of the swapped ratio.
        encode: parameters and uint8 images -> encoded images, jitted.
        targets: parameters, encoded images and a key -> targets, jitted.
        sharding: the sharding of a batch.
    """

    name: str
    schedule: Pyramid
    tokenizer: nn.Module
    tables: PositionTables
    shared: SharedPrograms
    encode: Any
    targets: Any
    sharding: jax.sharding.Sharding

    def with_targets(self, params: Any, inputs: StepInputs, key: jax.Array) -> StepInputs:
        """The inputs with targets, whose shapes are the same for grids of equal sizes.

        Args:
            params: parameters of the tokenizer.
            inputs: a micro-batch with encoded images.
            key: the key of the micro-batch.
        """
        targets: Targets = self.targets(params, inputs.encoded, key)
        return inputs.replace(encoded=targets)

    def abstract_inputs(
        self, params: Any, prompts: Any, *, batch: int, key: jax.Array
    ) -> StepInputs:
        """What `with_targets` returns, abstract.

        Args:
            params: parameters of the tokenizer.
            prompts: the encoded prompts of `batch` images.
            batch: images of a micro-batch, over all devices.
            key: the key of a micro-batch.
        """
        images = jax.ShapeDtypeStruct((batch, *self.tokenizer.resolution, 3), jnp.uint8)
        encoded = jax.eval_shape(self.encode, params, images)
        targets = jax.eval_shape(self.targets, params, encoded, key)
        return StepInputs(
            encoded=jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.sharding), targets
            ),
            prompts=abstract(prompts),
            tables=self.tables,
        )


def shared_programs(
    run: Run,
    names: tuple[str, ...],
    tokenizer: nn.Module,
    *,
    mesh: Mesh,
    encode_prompts: Callable[[Any, Any], Any] | None,
) -> SharedPrograms:
    """The programs of a run, to be compiled on first use.

    Args:
        run: the config, with the schedule of one of the templates.
        names: the templates.
        tokenizer: the module at the same schedule.
        mesh: the devices.
        encode_prompts: as in `TrainingProgram`.
    """
    platform = mesh.devices.flat[0].platform
    program = build_program(run, mesh, tokenizer, platform=platform, encode_prompts=encode_prompts)
    return SharedPrograms(
        names=names,
        program=program,
        train=jax.jit(program.train, donate_argnums=0),
        score=jax.jit(program.score, out_shardings=rules.replicated(mesh)),
    )


def template_programs(
    name: str, model: Family, tokenizer: nn.Module, *, mesh: Mesh, shared: SharedPrograms
) -> TemplatePrograms:
    """The programs of a template, to be compiled on first use.

    Args:
        name: name of the template.
        model: the model, with the schedule of the template.
        tokenizer: the module at the same schedule.
        mesh: the devices.
        shared: the programs of all templates whose steps have equal sizes.
    """
    sharding = rules.batch_sharding(mesh)
    encode = functools.partial(tokens.encode, tokenizer)
    targets = functools.partial(tokens.teacher_forcing, tokenizer)
    return TemplatePrograms(
        name=name,
        schedule=model.schedule,
        tokenizer=tokenizer,
        tables=rules.shard(model.build().position_tables, rules.replicated(mesh)),
        shared=shared,
        encode=jax.jit(encode, out_shardings=sharding),
        targets=jax.jit(targets, out_shardings=sharding),
        sharding=sharding,
    )


def abstract(arrays: Any) -> Any:
    """Shapes, dtypes and shardings of arrays."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), arrays
    )
