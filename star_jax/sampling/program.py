"""Which one jitted program samples images?"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from star_jax.core import condition
from star_jax.core.argument_types import show
from star_jax.core.buckets import Buckets
from star_jax.core.guidance import StepSettings, layer_mixing
from star_jax.core.settings import Settings
from star_jax.errors import UserError
from star_jax.nn.bind import bind
from star_jax.nn.transformer import Transformer
from star_jax.protocols import Family, SamplingMethod
from star_jax.sampling.methods import FilteredSampling, SmoothSampling
from star_jax.sampling.sampler import GivenCodes, Sample, sample
from star_jax.sampling.stable import StableSampling, plan_of_settings

SEEDS = 2**32  # seeds lie below
HEAVY = ('blocks', 'to_logits', 'merge')  # parts with products in the compute dtype
# The layers of the decoder that make the pixels: bfloat16 has no more bits than a pixel.
EXACT = ('norm_out', 'conv_out')


@flax.struct.dataclass
class SamplingInputs:
    """The arguments of one run of the program.

    Attributes:
        keys_B: one key per image.
        prompted: conditions of B prompts.
        empty: the condition of the empty prompt, one row; None: no guidance, prompted rows alone.
        negative: the condition of a prompt to move away from, one row, in place of no prompt.
        settings: guidance and temperature of every step.
        method: how codes are sampled.
        given: codes that are fed back instead of the sampled ones.
        stop: sample the first `stop` steps only (static; 0: all).
    """

    keys_B: jax.Array
    prompted: Any
    empty: Any
    settings: StepSettings
    method: SamplingMethod
    given: GivenCodes | None = None
    negative: Any = None
    stop: int = flax.struct.field(pytree_node=False, default=0)


Program = Callable[[Any, SamplingInputs], jax.Array]  # with params; returns uint8 [B, H, W, 3]


def inputs(
    config: Family,
    settings: Settings,
    *,
    keys_B: jax.Array,
    prompted: Any,
    empty: Any,
    negative: Any = None,
    given: GivenCodes | None = None,
) -> SamplingInputs:
    """The inputs for a model of `config` under a user's settings.

    Args:
        config: the model.
        settings: how images are sampled.
        keys_B: one key per image.
        prompted: the conditions of the prompts, one row per image.
        empty: the encoded empty prompt, one row.
        negative: the encoded `settings.negative`, one row; None without.
        given: codes to start from; None without.

    Raises:
        UserError: as for `step_settings` and `sampling_method`.
    """
    steps = step_settings(config, settings)
    return SamplingInputs(
        keys_B=keys_B,
        prompted=prompted,
        empty=empty if steps.guided else None,
        settings=steps,
        method=sampling_method(config, settings),
        negative=negative if steps.guided else None,
        given=given,
        stop=settings.stop,
    )


def step_settings(config: Family, settings: Settings) -> StepSettings:
    """Guidance and temperature of every step, as the family derives them.

    Steps that are not sampled, after `settings.stop`, have no guidance.

    Raises:
        UserError: numbers per step of another length than the steps of the model, guidance after
            layers that it does not have, or a stop after its last step.
    """
    steps, layers = config.schedule.steps, settings.guidance_layers
    if settings.stop > steps:
        raise UserError(
            f'stop is {settings.stop}, but the model samples in {steps} steps: choose at most '
            f'{steps} (0: all)'
        )
    if min(layers) < -config.depth:
        raise UserError(
            f'guidance_layers holds {min(layers)}, but the model has {config.depth} layers: choose '
            f'numbers from {-config.depth} to 0'
        )
    for name in ('guidance_per_step', 'temperature_per_step'):
        count = len(getattr(settings, name))
        if count not in (0, steps):
            raise UserError(
                f'{name} has {count} numbers, but the model samples in {steps} steps: give {steps}'
            )
    guidances = settings.guidance_per_step or (settings.guidance,) * steps
    temperatures = settings.temperature_per_step or (settings.temperature,) * steps
    weights_S = of_steps(config.guidance_weights, guidances)
    weights_S[min(settings.guided_steps or steps, settings.stop or steps) :] = 0
    inside = tuple(layer for layer in layers if layer < 0)
    mixing = layer_mixing(weights_S, config.depth, inside)
    return StepSettings(
        guidance=weights_S if 0 in layers else np.zeros_like(weights_S),
        temperature=of_steps(config.temperatures, temperatures),
        mixing=mixing if inside and weights_S.any() else None,
    )


def check_temperatures(config: Family, settings: Settings) -> None:
    """Raises UserError for a temperature at which the family does not sample."""
    for temperature in {settings.temperature, *settings.temperature_per_step}:
        config.temperatures(temperature)


def check_negative(config: Family, settings: Settings, recommended: Settings) -> None:
    """Raises UserError for a negative prompt of the user where no sampled step is guided.

    Args:
        config: the model.
        settings: how images are sampled.
        recommended: the settings of the model folder, whose negative prompt is not the user's.
    """
    if settings.negative in ('', recommended.negative):
        return
    if not step_settings(config, settings).guided:
        raise UserError(
            f'negative is {show(settings.negative)}, but no step is guided, so that it would '
            'change nothing: give a larger guidance, or leave negative out'
        )


def of_steps(of_number: Callable[[float], np.ndarray], numbers: Sequence[float]) -> np.ndarray:
    """[S] float32: the family's value at each step, from the number given for that step."""
    every = {number: of_number(number) for number in set(numbers)}
    return np.asarray([every[number][step] for step, number in enumerate(numbers)], np.float32)


def sampling_method(config: Family, settings: Settings) -> SamplingMethod:
    """How codes are sampled under a user's settings.

    Raises:
        UserError: stable sampling of a model without a refinement head, of scales that it cannot
            refine, or with settings that it does not have.
    """
    filtered = FilteredSampling(config.filter(settings))
    plain = SmoothSampling(steps=config.schedule.steps) if settings.smooth else filtered
    if settings.stable.version == 'off':
        return plain
    if config.refinement is None:
        raise UserError(
            'stable sampling needs a model with a refinement head, which this one has not: train '
            'one on it (a config whose model has a refinement, and --init), or leave it off'
        )
    if settings.guidance_layers != (0,) or settings.guidance_per_step or settings.guided_steps:
        raise UserError(
            'stable sampling guides all logits by one number: leave guidance_layers, '
            'guidance_per_step and guided_steps out, or stable sampling off'
        )
    return StableSampling(
        plain=plain,
        in_passes=filtered,
        guidance=settings.guidance,
        plan=plan_of_settings(config.schedule, settings.stable, config.refinement.first),
        once=settings.stable.once,
    )


def compile_program(network: Transformer, tokenizer: nn.Module, buckets: Buckets = ()) -> Program:
    """The program from encoded prompts to pixels, compiled once per batch size, top-k and method.

    Where a network mixes the rows of a batch, every image is a batch of its own, and no sharding of
    a batch applies inside it.

    Args:
        network: the transformer.
        tokenizer: its tokenizer.
        buckets: the scales of each share one loop body.

    Raises:
        UserError: invalid buckets. The program raises it for buckets of scales that its method
            samples in different ways.
    """
    network.schedule.groups(shared=buckets)
    if network.mixes_rows:
        network = network.with_sharding(None)
        return jax.jit(functools.partial(_sample_one_by_one, network, tokenizer, buckets))
    return jax.jit(functools.partial(_sample_images, network, tokenizer, buckets))


def image_keys(seeds: Sequence[int]) -> jax.Array:
    """[B] keys: a seed (modulo 2^32) samples the same image, alone or in any batch."""
    return jax.vmap(jax.random.key)(jnp.asarray(np.asarray(seeds) % SEEDS, jnp.uint32))


def cast(params: dict, dtype: str) -> dict:
    """The parameters 'model' and 'tokenizer' in the compute dtype, once, before the program.

    Cast are the kernels of the network's layers and head, and the tokenizer's decoder without the
    layers that make the pixels. Everything else is computed in float32 and stays in it: embeddings,
    positions, score scales, codes, the canvas.
    """

    def convert(path: tuple, x: jax.Array) -> jax.Array:
        part, *names = [key.key for key in path]
        if part == 'tokenizer':
            heavy = names[0] == 'decoder' and names[1] not in EXACT
        else:
            inside = any(name in HEAVY for name in names[:2])  # the network or its refiner
            heavy = inside and names[-1] == 'kernel'
        return x.astype(dtype) if heavy else x

    return jax.tree_util.tree_map_with_path(convert, params)


def abstract_cast(params: dict, dtype: str) -> dict:
    """`cast` of arrays that may be abstract: shapes and dtypes, with the given shardings."""
    types = jax.eval_shape(functools.partial(cast, dtype=dtype), params)
    return jax.tree.map(
        lambda leaf, new: jax.ShapeDtypeStruct(leaf.shape, new.dtype, sharding=leaf.sharding),
        params,
        types,
    )


def _sample_images(
    network: Transformer,
    tokenizer: nn.Module,
    buckets: Buckets,
    params: dict,
    inputs: SamplingInputs,
) -> jax.Array:
    return tokenizer.to_uint8(sample_batch(network, tokenizer, buckets, params, inputs).images)


def sample_batch(
    network: Transformer,
    tokenizer: nn.Module,
    buckets: Buckets,
    params: dict,
    inputs: SamplingInputs,
) -> Sample:
    """Images [B, H, W, 3] float32 and codes [B, L, *codes.shape] of a batch.

    The parts are those of `compile_program`, the others its program's arguments. A network that
    mixes the rows of a batch samples other images than each alone would be.
    """
    rows = inputs.prompted
    if inputs.empty is not None:
        if inputs.negative is None:
            unprompted = bind(network, params['model']).unprompted(inputs.prompted, inputs.empty)
        else:
            unprompted = condition.repeat(inputs.negative, like=inputs.prompted)
        rows = condition.stack(inputs.prompted, unprompted)
    return sample(
        network,
        tokenizer,
        params,
        keys_B=inputs.keys_B,
        condition=rows,
        settings=inputs.settings,
        method=inputs.method,
        given=inputs.given,
        buckets=buckets,
        stop=inputs.stop,
    )


def _sample_one_by_one(
    network: Transformer,
    tokenizer: nn.Module,
    buckets: Buckets,
    params: dict,
    inputs: SamplingInputs,
) -> jax.Array:
    codes = None if inputs.given is None else inputs.given.codes

    def sample_one(key: jax.Array, prompted: Any, codes: jax.Array | None) -> jax.Array:
        given = None if codes is None else inputs.given.replace(codes=codes[None])
        single = inputs.replace(
            keys_B=key[None], prompted=jax.tree.map(lambda x: x[None], prompted), given=given
        )
        return _sample_images(network, tokenizer, buckets, params, single)[0]

    return jax.vmap(sample_one)(inputs.keys_B, inputs.prompted, codes)
