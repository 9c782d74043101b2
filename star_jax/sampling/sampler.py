"""How do the conditions of images become their codes and pixels?

One program from encoded prompts to images. The same loop over steps serves a pyramid, whose steps
grow and are unrolled or padded to share a scanned body, and a raster, whose equal steps share one
as they are.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from star_jax.core.buckets import Buckets
from star_jax.core.cache import KV
from star_jax.core.codes import Codes, Sampled
from star_jax.core.guidance import StepSettings
from star_jax.core.schedule import Group, Schedule, Step
from star_jax.nn.bind import bind
from star_jax.nn.transformer import Transformer
from star_jax.protocols import MethodTrace, SamplingMethod, StepFns
from star_jax.sampling import trunks
from star_jax.sampling.kv_pieces import Carry, KVPieces


class StepTrace(NamedTuple):
    """Intermediate results of a step, or of a stack of steps along a new first axis.

    Attributes:
        method: logits before and after guidance, and filtered probabilities.
        sampled: [B, L, *codes.shape] codes of the method, before given codes replace them.
        canvas: the tokenizer's canvas after the step.
        inputs: the tokenizer's inputs of the next step; None after the last.
    """

    method: MethodTrace
    sampled: jax.Array
    canvas: jax.Array
    inputs: jax.Array | None


class Trace(NamedTuple):
    """Intermediate results of the sampler.

    Attributes:
        start: [R, rows of step 0, D], the rows of the first step.
        groups: the steps, stacked where they share a loop body; `steps` unstacks them.
        cache: keys and values of every layer, after the last step.
    """

    start: jax.Array
    groups: tuple[StepTrace, ...]
    cache: KV

    def steps(self) -> list[StepTrace]:
        """The trace of every step, in order."""
        return [
            jax.tree.map(lambda x, i=i: x[i], group)
            for group in self.groups
            for i in range(len(group.canvas))
        ]


class StepOutput(NamedTuple):
    """The results of a step, or of a stack of steps.

    Attributes:
        codes: [B, L, *codes.shape], or stacked [steps, B, L, *codes.shape].
        trace: what was computed on the way, stacked likewise; None unless requested.
    """

    codes: jax.Array
    trace: StepTrace | None


class Sample(NamedTuple):
    """Images and how they were made.

    Attributes:
        images: [B, H, W, 3] float32 in [-1, 1].
        codes: [B, L, *codes.shape] of all steps that were sampled.
        trace: None unless requested.
    """

    images: jax.Array
    codes: jax.Array
    trace: Trace | None


@flax.struct.dataclass
class GivenCodes:
    """Codes that are fed back instead of the sampled ones.

    Attributes:
        codes: [B, L, *codes.shape] of all steps; those of other steps are ignored.
        mask_S: [S] bool, True for the steps that are given.
    """

    codes: jax.Array
    mask_S: jax.Array

    @classmethod
    def of_steps(
        cls, steps: Mapping[int, jax.Array], schedule: Schedule, codes: Codes
    ) -> 'GivenCodes':
        """Makes it from the codes [B, L of the step, *codes.shape] of at least one step.

        Args:
            steps: codes [B, L of the step, *codes.shape] by the number of their step.
            schedule: the steps of an image.
            codes: the codes of a token.
        """
        batch = len(next(iter(steps.values())))
        values = np.zeros((batch, schedule.length, *codes.shape), np.int32)
        for step, given in steps.items():
            values[:, schedule.offsets[step] : schedule.offsets[step + 1]] = given
        return cls(values, np.isin(np.arange(schedule.steps), list(steps)))

    def replace_codes(self, sampled: jax.Array, schedule: Schedule, step: Step) -> jax.Array:
        """The given codes of `step` where it is given, otherwise the `sampled` ones.

        Args:
            sampled: [B, L of the step, *codes.shape].
            schedule: the steps of an image.
            step: the step.
        """
        # A padded step never ends beyond L: it is padded to a later one.
        first, size = jnp.asarray(schedule.offsets)[step.index], sampled.shape[1]
        given = jax.lax.dynamic_slice_in_dim(jnp.asarray(self.codes), first, size, axis=1)
        return jnp.where(jnp.asarray(self.mask_S)[step.index], given.astype(sampled.dtype), sampled)


def sample(
    network: Transformer,
    tokenizer: nn.Module,
    params: Mapping[str, Any],
    *,
    keys_B: jax.Array,
    condition: Any,
    settings: StepSettings,
    method: SamplingMethod,
    given: GivenCodes | None = None,
    trace: bool = False,
    buckets: Buckets = (),
    stop: int = 0,
) -> Sample:
    """Samples one image per key.

    Args:
        network: the transformer.
        tokenizer: its tokenizer.
        params: parameters of both, as 'model' and 'tokenizer', and perhaps those of the layers
            apart, as 'layers' or 'kernels' (`weight_layout`).
        keys_B: one key per image, which is folded with each step.
        condition: B conditional rows and then B unconditional ones, or conditional rows alone (no
            guidance).
        settings: guidance and temperature of every step.
        method: how codes are sampled.
        given: codes that are fed back instead of the sampled ones.
        trace: also return what every step computed (static).
        buckets: the scales of each share one scanned body (static); no image depends on them.
        stop: sample the first `stop` steps only (static; 0: all).
    """
    schedule = network.schedule

    # Bound anew at each use: a bound module must not cross into the body of a scan.
    def net() -> Transformer:
        return bind(network, params['model'])

    def tok() -> nn.Module:
        return bind(tokenizer, params['tokenizer'])

    parse = tokenizer.codes.parse
    step_fns = StepFns(
        codes=tokenizer.codes,
        head=lambda features: parse(net().head(features, condition)),
        embed=lambda codes: tok().embed(codes),
        mix=lambda weights: tok().mix(weights),
        refine=lambda vectors, features, step: parse(
            net().refine(vectors, features, schedule.rows(step), condition)
        ),
        trace=trace,
    )
    x_RLD = start_RLD = net().start(condition)
    copies = len(x_RLD) // len(keys_B)
    groups = schedule.groups(tuple(map(method.kind, range(schedule.steps))), buckets)
    if stop:
        groups = tuple(group.before(stop) for group in groups if group.first < stop)
    trunk = trunks.choose(network, params, condition, None if trace else groups[-1].last)

    def embed(inputs: jax.Array, step: Step) -> jax.Array:
        x_BLD = net().embed(inputs, schedule.rows(step))
        # Else a partitioner may split it along channels, and gather all images to stack them.
        x_BLD = network.sharding(x_BLD, 'batch', 'tokens', None)
        return jnp.concatenate([x_BLD] * copies)

    def run_step(carry: Carry, step: Step) -> tuple[Carry, StepOutput]:
        x_RLD, memory, canvas = carry
        step_settings = settings.at(step.index)
        features_RLD, memory = trunk(x_RLD, memory, step, step_settings.mixing)
        sampled, method_trace = method(
            jax.vmap(jax.random.fold_in, (0, None))(keys_B, step.index),
            features_RLD[:, -schedule.sizes[step.like] :],
            step_settings,
            step,
            step_fns,
        )
        own_codes = sampled.codes_BL
        if given is not None:
            codes = given.replace_codes(own_codes, schedule, step)
            is_given = jnp.asarray(given.mask_S)[step.index]
            vectors = jnp.where(is_given, tok().embed(codes), sampled.vectors_BLC)
            sampled = Sampled(codes, vectors)
        canvas, inputs = tok().advance(canvas, sampled, step)
        step_trace = StepTrace(method_trace, own_codes, canvas, inputs) if trace else None
        if inputs is not None:
            x_RLD = embed(inputs, step.next())
        return Carry(x_RLD, memory, canvas), StepOutput(sampled.codes_BL, step_trace)

    def run_bucket(carry: Carry, group: Group) -> tuple[Carry, list[StepOutput]]:
        last = Step.at(group.members[-1])
        padding = schedule.reads[last.like] - carry.x_RLD.shape[1]
        padded = jnp.pad(carry.x_RLD, ((0, 0), (0, padding), (0, 0)))
        carry, (outputs,) = trunk.fold(run_step, carry._replace(x_RLD=padded), group)
        inputs = tok().following(carry.canvas, last)  # for the next step, at its own size
        if inputs is not None:
            carry = carry._replace(x_RLD=embed(inputs, last.next()))
        return carry, unpad_outputs(outputs, schedule, group, inputs)

    carry = Carry(x_RLD, KVPieces(), tok().blank(len(keys_B)))
    outputs = []
    for group in groups:
        run = run_bucket if group.padded else functools.partial(trunk.fold, run_step)
        carry, of_group = run(carry, group)
        outputs += of_group
    codes = [_flatten_steps(output.codes) for output in outputs]
    return Sample(
        images=tok().decode(carry.canvas),
        codes=jnp.concatenate(codes, axis=1),
        trace=Trace(start_RLD, tuple(output.trace for output in outputs), trunk.kv(carry.memory))
        if trace
        else None,
    )


def unpad_outputs(
    outputs: StepOutput, schedule: Schedule, group: Group, inputs: jax.Array | None
) -> list[StepOutput]:
    """The outputs of each step of a bucket without their padding.

    Args:
        outputs: stacked outputs of the padded steps.
        schedule: the steps of an image.
        group: the steps of the bucket.
        inputs: the inputs of the step after the bucket, [B, L, C]; None after the last.
    """
    steps = []
    for position, step in enumerate(group.members):
        output = jax.tree.map(lambda x, at=position: x[at : at + 1], outputs)
        cut_tokens = functools.partial(_cut_tokens, schedule.sizes[step])
        trace = output.trace
        if trace is not None:
            following = trace.inputs[:, :, : schedule.reads[min(step + 1, schedule.steps - 1)]]
            if step == group.members[-1]:
                following = None if inputs is None else inputs[None]
            method, sampled = jax.tree.map(cut_tokens, (trace.method, trace.sampled))
            trace = StepTrace(method, sampled, trace.canvas, following)
        steps.append(StepOutput(cut_tokens(output.codes), trace))
    return steps


def _cut_tokens(size: int, x: jax.Array) -> jax.Array:
    """The first tokens of arrays [1, B, L, ...]."""
    return x[:, :, :size]


def _flatten_steps(codes: jax.Array) -> jax.Array:
    """[steps, B, L, ...] -> [B, steps * L, ...]."""
    codes = jnp.moveaxis(codes, 0, 1)
    return codes.reshape(len(codes), -1, *codes.shape[3:])
