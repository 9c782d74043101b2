"""Which programs does a run execute, and on which arrays?

No weights, text or images are needed: the published sizes stand for a tokenizer or a text encoder
that a config names and this machine does not have.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from star_jax.checkpoint import models
from star_jax.core.buckets import Buckets, choose
from star_jax.core.flops import count_kinds
from star_jax.errors import UserError
from star_jax.families.fit import check_tokenizer
from star_jax.files import SHIPPED
from star_jax.nn.attention_dispatch import named
from star_jax.parallel import rules
from star_jax.parallel.mesh import batch_shards
from star_jax.protocols import PromptEncoder, TokenizerConfig
from star_jax.sampling import program
from star_jax.text.encoder import abstract_encoder
from star_jax.text.encoder_folder import locate
from star_jax.text.hf_config import PUBLISHED
from star_jax.training import program as training_program
from star_jax.training.program import Frozen, StepInputs, TrainingProgram
from star_jax.training.run import Run, resolve
from star_jax.training.state import abstract_state

TRAINING_STEP = 'training step'


class Program(NamedTuple):
    """A jitted function and its abstract arguments (shapes, dtypes and shardings)."""

    function: Any
    args: tuple


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """The programs that devices run for one batch, and the arrays that they store.

    Attributes:
        images: images of the batch.
        programs: the programs by name; they run one after another, the main one is first.
        resident: abstract arrays that stay in memory, by name.
        trained: the resident parameters that have gradients; None without training.
        counted_programs: the same arithmetic, without kernels that hide it from a count of FLOPs.
        needed_programs: the same results, with nothing computed twice and nothing padded.
        notes: sentences about sizes that were assumed.
    """

    images: int
    programs: dict[str, Program]
    resident: dict[str, Any]
    trained: Any
    counted_programs: dict[str, Program]
    needed_programs: dict[str, Program]
    notes: tuple[str, ...]


MakeWorkload = Callable[[Run, Mesh | AbstractMesh, str], Workload]


def training(run: Run, mesh: Mesh | AbstractMesh, platform: str) -> Workload:
    """A training step, and every program that the run executes beside it.

    Raises UserErrors as building the run does, except for paths that this machine does not have.
    """
    check_batch(run.batch, mesh)
    vq, tokenizer_note = _tokenizer(run)
    encoder, text_note = _encoder(run)
    inside = run.features == 'inside' or not run.model.text_width
    encode_prompts = encoder.apply if inside else None

    def build(**changes: Any) -> TrainingProgram:
        changed = dataclasses.replace(run, **changes)
        return training_program.build_program(
            changed, mesh, vq.build(), platform=platform, encode_prompts=encode_prompts
        )

    step_program, params = build(), run.model.abstract()
    state = abstract_state(step_program.start, step_program.trained(params), mesh)
    prompts, features = _prompts_and_condition(encoder, run.batch)
    tokenizer_params = rules.abstract(vq.abstract(), mesh, ' of the tokenizer')
    encoder_params, base = {}, step_program.base(params)
    if inside:
        encoder_params = rules.abstract(encoder.abstract_params(), mesh, ' of the text encoder')
    frozen = Frozen(
        tokenizer=tokenizer_params,
        empty=_replicated(_prompts_and_condition(encoder, 1)[1], mesh),
        encoder=encoder_params,
        base=rules.abstract(base, mesh),
    )
    encoded = step_program.abstract_encoded(tokenizer_params, run.batch)
    batch = StepInputs(encoded=encoded, prompts=prompts if inside else features)
    batch = _split_batch(batch, mesh)
    key = jax.eval_shape(lambda: jax.random.key(0))
    args = (state, frozen, batch, _replicated(key, mesh))
    encoding = {}
    if not run.cache:
        shape = (run.batch, *vq.resolution, 3)
        images = _split_batch(jax.ShapeDtypeStruct(shape, jnp.uint8), mesh)
        encode = jax.jit(step_program.encode, out_shardings=rules.batch_sharding(mesh))
        encoding = {'tokenizer': Program(encode, (tokenizer_params, images))}
    resident = {
        'parameters': state.params,
        'optimizer': state.opt,
        'averages': state.ema,
        'frozen model': frozen.base,
        'text encoder': frozen.encoder,
        'tokenizer': frozen.tokenizer,
        'batch': batch,
    }
    countable, needed = build(attention='by_scale'), build(**training_program.COUNTED)
    step = Program(jax.jit(step_program.train, donate_argnums=0), args)
    return Workload(
        images=run.batch,
        programs={TRAINING_STEP: step} | encoding,
        resident={name: tree for name, tree in resident.items() if jax.tree.leaves(tree)},
        trained=state.params,
        counted_programs={TRAINING_STEP: Program(countable.train, args)} | encoding,
        needed_programs={TRAINING_STEP: Program(needed.train, args)} | encoding,
        notes=tuple(filter(None, (tokenizer_note, text_note))),
    )


def sampling(
    run: Run, mesh: Mesh | AbstractMesh, platform: str, buckets: Buckets | None = None
) -> Workload:
    """Generating a batch of images from encoded text, with the settings of `run.sampling`.

    Scales of one of the `buckets` share a program body (None: the default of the platform); the
    arithmetic of padded rows is not needed.
    """
    check_batch(run.batch, mesh)
    vq, tokenizer_note = _tokenizer(run)
    encoder, text_note = _encoder(run)
    tokenizer, sizes = vq.build(run.dtype), run.model.schedule.sizes

    def build(attention: str, buckets: Buckets) -> Program:
        attend = named(attention, platform)
        network = run.model.build(run.dtype, attend=attend).with_sharding(mesh)
        return Program(program.compile_program(network, tokenizer, buckets), args)

    model_params = rules.abstract(run.model.abstract(), mesh, ' of the model')
    tokenizer_params = rules.abstract(vq.abstract(), mesh, ' of the tokenizer')
    params = _cast({'model': model_params, 'tokenizer': tokenizer_params}, run.dtype)
    keys_B = jax.eval_shape(lambda: program.image_keys(range(run.batch)))
    condition = _prompts_and_condition(encoder, run.batch)[1]
    keys_B, prompted = _split_batch((keys_B, condition), mesh)
    inputs = program.inputs(
        run.model,
        run.sampling,
        keys_B=keys_B,
        prompted=prompted,
        empty=_replicated(_prompts_and_condition(encoder, 1)[1], mesh),
    )
    numbers = (inputs.settings, inputs.method)
    settings, method = _replicated(jax.eval_shape(lambda: numbers), mesh)
    args = (params, inputs.replace(settings=settings, method=method))
    chosen_buckets = choose(buckets, sizes, platform)
    return Workload(
        images=run.batch,
        programs={'sampling': build(run.attention, chosen_buckets)},
        resident={'parameters': params['model'], 'tokenizer': params['tokenizer']},
        trained=None,
        counted_programs={'sampling': build('by_scale', chosen_buckets)},
        needed_programs={'sampling': build('by_scale', ())},
        notes=tuple(filter(None, (tokenizer_note, text_note))),
    )


def count_flops(programs: dict[str, Program]) -> dict[str, dict[str, int]]:
    """Floating-point operations of each program on all chips, by kind (`core.flops`)."""
    return {name: count_kinds(item.function, *item.args) for name, item in programs.items()}


def check_batch(batch: int, mesh: Mesh | AbstractMesh) -> None:
    """Raises UserError if the mesh does not divide a batch."""
    ways = batch_shards(mesh)
    if batch % ways:
        nearest = ways * max(round(batch / ways), 1)
        raise UserError(
            f'a batch of {batch} does not divide over data x fsdp = {ways} chips: give a multiple '
            f'of {ways}, such as {nearest}, or put more chips on --mesh.tensor and --mesh.sequence'
        )


def device_bytes(tree: Any) -> int:
    """Bytes that one device stores of abstract arrays with shardings (random keys are left out)."""
    return sum(
        leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))
        for leaf in jax.tree.leaves(tree)
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    )


def _tokenizer(run: Run) -> tuple[TokenizerConfig, str]:
    """The tokenizer that the run names; otherwise the published one, and a note that says so."""
    path, model = resolve(run).tokenizer, run.model
    if path == SHIPPED or os.path.isdir(path):
        vq = models.read_tokenizer(path).config.at(model.schedule)
        check_tokenizer(
            model,
            vq,
            where=f'the tokenizer {path} does not fit',
            remedy='set model.codes and model.channels to those of the tokenizer',
        )
        return vq, ''
    return (
        model.default_tokenizer(),
        f'tokenizer {path} is not on this machine: the published sizes are used',
    )


def _encoder(run: Run) -> tuple[PromptEncoder, str]:
    """The encoder of prompts, and a note if its sizes are those of a published one."""
    width, path = run.model.text_width, os.path.expanduser(run.text)
    if not width or os.path.isdir(path):
        return run.model.prompt_encoder(
            lambda: abstract_encoder(run.text, locate(run.text).config)
        ), ''
    if width not in PUBLISHED:
        known = ', '.join(map(str, PUBLISHED))
        raise UserError(
            f'the text encoder {run.text} is not on this machine, and no published encoder has '
            f'width {width} (only {known}): give the path of a folder with --text'
        )
    encoder = abstract_encoder(run.text, PUBLISHED[width])
    kind = PUBLISHED[width]['model_type']
    return encoder, f'text encoder: the published {kind} of width {width}, {encoder.length} tokens'


def _prompts_and_condition(encoder: PromptEncoder, rows: int) -> tuple[Any, Any]:
    """Abstract prompts as a host prepares them, and the condition that an encoder makes of them."""
    tokens = encoder.abstract_tokens(rows)
    params = nn.unbox(encoder.abstract_params())
    return tokens, jax.eval_shape(encoder.apply, params, tokens)


def _cast(params: dict, dtype: str) -> dict:
    """`program.cast` of abstract arrays; they keep their shardings."""
    types = jax.eval_shape(functools.partial(program.cast, dtype=dtype), params)
    return jax.tree.map(
        lambda leaf, new: jax.ShapeDtypeStruct(leaf.shape, new.dtype, sharding=leaf.sharding),
        params,
        types,
    )


def _replicated(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    return _with_sharding(tree, rules.replicated(mesh))


def _split_batch(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    return _with_sharding(tree, rules.batch_sharding(mesh))


def _with_sharding(tree: Any, sharding: NamedSharding) -> Any:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        nn.unbox(tree),
    )
