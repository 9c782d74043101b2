"""What will a run cost, before it starts?"""

import logging
import math
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from star_jax.core.codes import Bits, Codes
from star_jax.core.schedule import Schedule
from star_jax.errors import UserError
from star_jax.parallel import gradient_sum_time, links, machine, rules
from star_jax.parallel.mesh import REPLICAS, batch_shards
from star_jax.training.optimizer import parameter_name
from star_jax.training.run import Run, TokenizerRun
from star_jax.training.state import TrainState

MIN_USED = 0.2  # share of the possible codes below which a codebook counts as collapsed
MIN_USED_BY_SCALE = 0.01  # a coarse scale needs few codes, but more than one
MIN_PERPLEXITY = 0.01  # of the possible codes: a few stray ones do not hide a collapse
MIN_CHANGED = 0.01  # share of the tokens with the rarer value of a bit below which it is stuck
MOST_ACCURATE = 0.95  # share of right logits above which a discriminator has won
# What to do about a collapse of trained vectors, and of bits.
RESTART = (
    'start with plain_steps, restart unused codes longer (restart_until), or lower the learning '
    'rate'
)
ENTROPY = 'add EntropyOfBits to objective.entropy in the config, or raise its weight'

log = logging.getLogger(__name__)


def describe(
    state: TrainState,
    schedule: Schedule,
    *,
    flops: int,
    run: Run | TokenizerRun,
    examples: int,
) -> dict[str, str]:
    """The size of a run, as lines for a user.

    Args:
        state: the state, which may be abstract.
        schedule: the order of an image's tokens.
        flops: floating-point operations of a step.
        run: the config.
        examples: number of training examples.
    """
    state = nn.unbox(state)
    held = f'{state_bytes(state) / 2**20:,.0f} MiB'
    epochs = run.mean_batch * run.pace.steps / examples
    constants = run.model.constants if isinstance(run, Run) else frozenset()
    beside = ''
    if state.adversary:
        beside = (
            f' and {count_parameters(state.adversary.params, frozenset()):,} of the discriminator'
        )
    lines = {
        'parameters': f'{count_parameters(state.params, constants):,}{beside}',
        'state in memory': f'{held} (parameters, averages, optimizer)',
        'tokens per image': f'{schedule.length:,} in {schedule.steps} steps',
        'arithmetic per step': f'{flops / 1e9:,.1f} GFLOP',
        'images': f'{run.mean_batch:g} per step, {run.pace.steps:,} steps, {epochs:,.2f} epochs',
        'devices': f'{jax.device_count()} x {jax.devices()[0].device_kind}' + _processes(),
    }
    if isinstance(run, Run) and isinstance(run.model.vocabulary, Bits):
        lines['classifier'] = classifier(run.model.vocabulary, run.model.width)
    return lines


def classifier(bits: Bits, width: int) -> str:
    """The size of a head with two logits per bit, beside one with a logit per code."""
    pairs, codes = bits.num_logits * (width + 1), width * 2**bits.width
    return (
        f'{pairs:,} parameters ({_held(4 * pairs)}) for {bits.width} bits of a token; one over '
        f'2^{bits.width} codes would have {codes:.2g} ({_held(4 * codes)})'
    )


def _held(size: int) -> str:
    """A number of bytes, in the largest unit that is not below 1."""
    units = {'TiB': 2**40, 'GiB': 2**30, 'MiB': 2**20}
    unit = next((name for name, one in units.items() if size >= one), 'MiB')
    return f'{size / units[unit]:.2g} {unit}'


def replica_sum(params: Any, mesh: Mesh, dtype: str) -> dict[str, str]:
    """How long replicas sum their gradients, as a line for a user; none without replicas.

    Args:
        params: the trained parameters, which may be abstract, with their shardings.
        mesh: the devices.
        dtype: the dtype of the sum.
    """
    if mesh.shape[REPLICAS] == 1:
        return {}
    size, devices = rules.device_bytes(params), list(mesh.devices.flat)
    fabric, sizes = links.fabric_of(devices), tuple(mesh.shape.values())
    local_chips = links.local_chips(devices)
    if fabric is None:
        sent = gradient_sum_time.replica_sum(size, dtype, sizes, local_chips=local_chips).bytes
        return {'sum of gradients': f'{sent / 2**20:,.1f} MiB sent by each device, in {dtype}'}
    seconds = gradient_sum_time.replica_sum_seconds(fabric, size, sizes, local_chips=local_chips)
    return {'sum of gradients': gradient_sum_time.sum_sentence(seconds, dtype)}


def device_sum(mesh: Mesh, dtype: str) -> dict[str, str]:
    """How the devices sum the gradients of a tokenizer, as a line for a user; none of one device.

    Args:
        mesh: the devices.
        dtype: dtype of the activations.
    """
    if batch_shards(mesh) == 1:
        return {}
    return {'sum of gradients': f'in {dtype} (--dtype), over devices in every micro-batch'}


def _processes() -> str:
    return f' in {jax.process_count()} processes' if jax.process_count() > 1 else ''


def check_batch(batch: int, resolution: tuple[int, int], mesh: Mesh) -> None:
    """Checks that the mesh can split a batch of images, and that memory holds it.

    Only the images are counted, in float32: a batch that passes may still be too large.

    Args:
        batch: images, over all devices.
        resolution: (height, width) of an image, in pixels.
        mesh: the devices.

    Raises:
        UserError: it cannot be split, or is too large.
    """
    ways = batch_shards(mesh)
    if batch % ways:
        fits = ways * max(round(batch / ways), 1)
        raise UserError(
            f'a batch of {batch} does not divide over {ways} devices: give a multiple of {ways}, '
            f'such as {fits}'
        )
    held = batch // ways * len(rules.process_rows(mesh, ways))
    size = held * 3 * math.prod(resolution) * np.dtype(np.float32).itemsize
    machine.check_memory(
        f'a batch of {batch:,} images of {" x ".join(map(str, resolution))} px', size
    )


def check_state(state: TrainState) -> None:
    """Raises UserError if a CPU trains a state that the memory of this machine cannot hold."""
    if jax.default_backend() == 'cpu':
        size = state_bytes(state) // jax.process_count()
        machine.check_memory('parameters, averages and optimizer of this model', size)


def warn_of_collapse(
    usage_KV: np.ndarray,
    codes: Codes,
    advice: str,
    images: str = 'validation images',
) -> None:
    """Warns if held-out images use few codes, or few of them often, at one scale or over all.

    A scale with fewer tokens than codes cannot use all of them: its possible codes are as many as
    its tokens.

    Args:
        usage_KV: how often each scale used each value of a code.
        codes: the kind of codes.
        advice: what to do, RESTART or ENTROPY.
        images: what the images are, for the warning.
    """
    places = {' over all scales': (usage_KV.sum(0), MIN_USED)}
    for scale, usage_V in enumerate(usage_KV):
        places[f' at scale {scale}'] = usage_V, MIN_USED_BY_SCALE
    if len(usage_KV) == 1:
        places = {'': (usage_KV[0], MIN_USED)}
    for place, (usage_V, least) in places.items():
        if isinstance(codes, Bits):
            fault = _stuck_bits(usage_V.reshape(codes.width, -1), images)
        else:
            fault = _few_codes(usage_V, least, float(codes.perplexity(usage_V)), images)
        if fault:
            log.warning('codebook collapse%s: %s: %s', place, fault, advice)


def warn_of_winner(accuracy: float) -> None:
    """Warns if a discriminator is too accurate on validation images and their reconstructions."""
    if accuracy > MOST_ACCURATE:
        log.warning(
            'the discriminator wins: %.0f %% of its logits of validation images and their '
            'reconstructions are right, so the decoder learns little from it: lower the peak of '
            'objective.adversary.optimizer.learning_rate, or add a penalty (R1, LeCam) or an '
            'augmentation to objective.adversary in the config',
            100 * accuracy,
        )


def _few_codes(usage_V: np.ndarray, least: float, perplexity: float, images: str) -> str:
    """Says if fewer than this share of the possible codes is used, or few of them often."""
    possible, used = min(len(usage_V), int(usage_V.sum())), int((usage_V > 0).sum())
    if used >= least * possible and perplexity >= MIN_PERPLEXITY * possible:
        return ''
    return (
        f'{images} use {used} of {possible} possible codes (expected: at least '
        f'{math.ceil(least * possible)}) with a perplexity of {perplexity:.1f} (expected: at least '
        f'{MIN_PERPLEXITY * possible:.1f})'
    )


def _stuck_bits(usage_K2: np.ndarray, images: str) -> str:
    """Says if bits have one value in nearly all tokens."""
    tokens = usage_K2[0].sum()
    stuck = int((usage_K2.min(1) < MIN_CHANGED * tokens).sum())
    if tokens < 1 / MIN_CHANGED or not stuck:
        return ''
    return (
        f'{stuck} of {len(usage_K2)} bits have the same value in more than '
        f'{100 * (1 - MIN_CHANGED):.0f} % of the tokens of {images}'
    )


def count_parameters(params: Any, constants: frozenset[str]) -> int:
    """Numbers in parameters, except for those of constants."""
    return sum(
        math.prod(leaf.shape)
        for path, leaf in jax.tree.leaves_with_path(params)
        if parameter_name(path) not in constants
    )


def state_bytes(tree: Any) -> int:
    """Bytes of arrays, which may be abstract: also the size of a checkpoint."""
    tree = nn.unbox(tree)
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
