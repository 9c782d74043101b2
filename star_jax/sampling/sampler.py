"""How does a prompt become an image?

One program from encoded text to uint8 pixels. The same walk serves a pyramid, whose steps grow
and are unrolled or padded to share a scanned body, and a raster, whose equal steps share one as
they are.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from star_jax.core.buckets import Buckets
from star_jax.core.schedule import Group, Schedule, Step
from star_jax.core.visibility import StaticVisibility
from star_jax.nn.kernels import KV, Visibility
from star_jax.nn.transformer import Transformer
from star_jax.sampling.methods import SamplingMethod, StepFns


class Trace(NamedTuple):
    """What a step left behind; `inputs` are those of the next step, None after the last.

    `passes` are those of a draw that takes several, stacked, or None.
    """

    logits_BLV: jax.Array
    canvas: jax.Array
    inputs: jax.Array | None
    passes: Any = None


class StepOutput(NamedTuple):
    """What a step, or a stack of steps, leaves to the caller."""

    codes_BL: jax.Array
    trace: Trace | None


class Sample(NamedTuple):
    """`images` [B, H, W, 3] float32 in [-1, 1], `codes_BL`, and per group of steps its traces,
    stacked (empty unless asked for)."""

    images: jax.Array
    codes_BL: jax.Array
    traces: tuple[Trace, ...]


@flax.struct.dataclass
class Cache:
    """Keys and values of all rows, [depth, R, rows, N, H]; written once per step."""

    kv: KV

    def write(self, new: KV, first: int | jax.Array) -> 'Cache':
        place = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=first, axis=2)
        return Cache(jax.tree.map(place, self.kv, new))

    def until(self, row: int) -> 'Cache':
        """The rows before `row` alone."""
        return Cache(jax.tree.map(lambda kv: kv[:, :, :row], self.kv))

    def past(self, schedule: Schedule, rows: np.ndarray | jax.Array) -> tuple[KV, Visibility]:
        """The keys that `rows` may look back at, and what they see of them and of themselves.

        A step at a known place slices its prefix; a traced one sees the whole cache and masks what
        is not yet written.
        """
        if isinstance(rows, np.ndarray):
            prefix = jax.tree.map(lambda kv: kv[:, :, : rows[0]], self.kv)
            return prefix, StaticVisibility.of(schedule.visible_rows[rows])
        written = jnp.arange(self.kv.keys.shape[2]) < rows[0]
        earlier = jnp.broadcast_to(written, (len(rows), len(written)))
        return self.kv, jnp.concatenate([earlier, schedule.mask(rows)], axis=1)


def sample(
    model: Transformer,
    tokenizer: nn.Module,
    params: dict,
    keys_B: jax.Array,
    condition: Any,
    guidance_S: jax.Array,
    draw: SamplingMethod,
    trace: bool = False,
    buckets: Buckets = (),
) -> Sample:
    """One image per key.

    `params` holds those of `model` and of `tokenizer`. `condition` stacks prompted over unprompted
    rows, or holds prompted rows alone (no guidance). Image b draws from its own key, folded with
    the step. `trace` (static) also returns guided logits, canvas and next inputs of every step.
    The scales of each of the `buckets` (static) share one scanned body, which changes no image.
    """
    apply = functools.partial(model.apply, {'params': params['model']})
    token = functools.partial(tokenizer.apply, {'params': params['tokenizer']})
    schedule = model.schedule
    step_fns = StepFns(
        head=lambda features: apply(features, condition, method='head'),
        embed=lambda codes: token(codes, method='embed'),
        mix=lambda weights: token(weights, method='mix'),
        refine=lambda vectors, features, step: apply(
            vectors, features, schedule.rows(step), condition, method='refine'
        ),
        trace=trace,
    )
    text_kv = apply(condition, method='text_kv')  # once, not per step
    x_RLD = apply(condition, method='start')
    both = len(x_RLD) // len(keys_B)
    cache = _empty_cache(model, len(x_RLD))
    canvas = token(len(keys_B), method='blank')

    def enter(inputs: jax.Array, step: Step) -> jax.Array:
        x = apply(inputs, schedule.rows(step), method='embed')
        return jnp.concatenate([x] * both)

    def visit(carry: tuple, step: Step) -> tuple[tuple, StepOutput]:
        x_RLD, cache, canvas = carry
        rows = schedule.rows(step)
        written = cache.until(schedule.starts[step.like]) if step.padded else cache
        past, visibility = written.past(schedule, rows)
        features_RLD, new = apply(x_RLD, rows, text_kv, condition, past, visibility, method='trunk')
        cache = Cache(model.place(cache.write(new, rows[0]).kv))
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys_B, step.index)
        drawing = features_RLD[:, -schedule.sizes[step.like] :]
        drawn, logits = draw(keys, drawing, guidance_S[step.index], step, step_fns)
        canvas, inputs = token(canvas, drawn, step, method='advance')
        left = StepOutput(
            drawn.codes_BL, Trace(logits, canvas, inputs, drawn.passes) if trace else None
        )
        if inputs is not None:
            x_RLD = enter(inputs, step.next())
        return (x_RLD, cache, canvas), left

    def visit_bucket(carry: tuple, group: Group) -> tuple[tuple, list[StepOutput]]:
        last = Step.at(group.members[-1])
        x_RLD, cache, canvas = carry
        behind = schedule.reads[last.like] - x_RLD.shape[1]
        x_RLD = jnp.pad(x_RLD, ((0, 0), (0, behind), (0, 0)))
        carry, padded = scan(visit, group, (x_RLD, cache, canvas))
        x_RLD, cache, canvas = carry
        inputs = token(canvas, last, method='following')  # at full size, for who comes behind
        if inputs is not None:
            x_RLD = enter(inputs, last.next())
        return (x_RLD, cache, canvas), cut(padded, schedule, group, inputs)

    carry, left = (x_RLD, cache, canvas), []
    for group in schedule.groups(tuple(map(draw.kind, range(schedule.steps))), buckets):
        carry, some = visit_bucket(carry, group) if group.padded else walk(visit, group, carry)
        left += some
    canvas = carry[-1]
    codes = [jnp.moveaxis(one.codes_BL, 0, 1).reshape(len(keys_B), -1) for one in left]
    images = token(canvas, method='decode')
    return Sample(images, jnp.concatenate(codes, 1), tuple(one.trace for one in left if one.trace))


def walk(visit: Callable, group: Group, carry: Any) -> tuple[Any, list]:
    """Folds `visit(carry, step) -> (carry, left)` over the steps of a group.

    Returns what they left, stacked along a new first axis, in a list.
    """
    if group.count > 1:
        carry, many = scan(visit, group, carry)
        return carry, [many]
    carry, one = visit(carry, Step.at(group.first))
    return carry, [jax.tree.map(lambda x: x[None], one)]


def scan(visit: Callable, group: Group, carry: Any) -> tuple[Any, Any]:
    """The same with one body for all steps of the group."""
    like = group.members[-1 if group.padded else 0]

    def body(carry: Any, index: jax.Array) -> tuple[Any, Any]:
        return visit(carry, Step(index, like, group.padded))

    return jax.lax.scan(body, carry, jnp.asarray(group.members))


def cut(
    padded: StepOutput, schedule: Schedule, group: Group, inputs: jax.Array | None
) -> list[StepOutput]:
    """What each step of a bucket left, without its padding.

    `inputs` are those of the step behind the bucket.
    """
    left = []
    for place, step in enumerate(group.members):
        one = jax.tree.map(lambda x, at=place: x[at : at + 1], padded)
        size, trace = schedule.sizes[step], one.trace
        if trace is not None:
            following = trace.inputs[:, :, : schedule.reads[min(step + 1, schedule.steps - 1)]]
            if step == group.members[-1]:
                following = None if inputs is None else inputs[None]
            trace = trace._replace(logits_BLV=trace.logits_BLV[:, :, :size], inputs=following)
        left.append(StepOutput(one.codes_BL[:, :, :size], trace))
    return left


def _empty_cache(model: Transformer, rows: int) -> Cache:
    shape = (model.depth, rows, model.schedule.starts[-1], model.heads, model.width // model.heads)
    return Cache(model.place(KV(jnp.zeros(shape, model.dtype), jnp.zeros(shape, model.dtype))))
