"""Which parts and which programs does the config of a run describe?"""

from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import Mesh

from star_jax.nn.attention_dispatch import named
from star_jax.parallel.mesh import REPLICAS, batch_shards
from star_jax.training.gradients import Replicas
from star_jax.training.optimizer import decayed, everything
from star_jax.training.program import Recipe, TrainingProgram
from star_jax.training.refinement_program import RefinementProgram
from star_jax.training.run import Run

# Changes to a run whose program can be counted: nothing is computed twice, and no kernel hides its
# arithmetic.
COUNTED = {'remat': 'none', 'attention': 'by_scale'}


def build_program(
    run: Run,
    mesh: Mesh,
    tokenizer: nn.Module,
    *,
    platform: str,
    encode_prompts: Callable[[Any, Any], Any] | None = None,
) -> TrainingProgram:
    """The programs of a run: those of its refinement head if its model has one.

    Args:
        run: the config of the run.
        mesh: the devices.
        tokenizer: the module whose codes are predicted, with the schedule of the model.
        platform: 'cpu', 'gpu' or 'tpu': chooses the attention kernel.
        encode_prompts: as for `TrainingProgram`.
    """
    attend = named(run.attention, platform)
    ways = batch_shards(mesh)
    parts = {
        'network': run.model.build(run.dtype, run.remat, run.unroll, attend).with_sharding(mesh),
        'tokenizer': tokenizer,
        'recipe': build_recipe(run, ways),
        'encode_prompts': encode_prompts,
        'batch_groups': ways,
        'replicas': build_replicas(run, mesh),
    }
    steps = run.pace.steps * run.optimizer.accumulate
    recipe = run.optimizer.for_batch(run.batch)
    if not run.model.refinement:
        optimizer = recipe.build(steps, constants=run.model.constants)
        return TrainingProgram(optimizer=optimizer, **parts)
    decays = everything if run.unmasking.decay_all else decayed
    optimizer = recipe.build(steps, decays)
    return RefinementProgram(optimizer=optimizer, unmasking=run.unmasking, **parts)


def build_recipe(run: Run, ways: int) -> Recipe:
    """The recipe of a run, with its batch split over so many ways of the mesh."""
    scaled = run.released_loss_scale and run.model.keep_tokens
    return Recipe(
        condition_drop=run.caption_drop,
        drop_path=run.model.drop_path,
        keep_tokens=run.model.keep_tokens,
        scales=run.trained_scales,
        balance=run.balance,
        label_smoothing=run.label_smoothing,
        bit_loss=run.bit_loss,
        loss_scale=run.batch // ways if scaled else 1.0,
        ema=run.ema,
        constants=run.model.constants,
    )


def build_replicas(run: Run, mesh: Mesh) -> Replicas:
    """Which gradients are kept apart: those of replicas that are summed late, or in another dtype.

    All others are summed where they are computed.
    """
    late = run.optimizer.accumulate > 1 or run.gradient_dtype != run.dtype
    apart = late and mesh.shape[REPLICAS] > 1
    return Replicas(mesh=mesh if apart else None, dtype=run.gradient_dtype)


def init_params(run: Run, key: jax.Array) -> Any:
    """The boxed random parameters of the model of a run; nothing is computed of inputs."""
    family = run.model
    inputs, condition = family.abstract_inputs(), family.abstract_condition()
    return family.build().lazy_init(key, inputs, condition)['params']
