"""Which programs does a run execute, and on which arrays?

No weights, text or images are needed: the published sizes stand for a tokenizer or a text encoder
that a config names and this machine does not have.
"""

import dataclasses
import functools
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
from star_jax.core.self_correction import SelfCorrection
from star_jax.core.settings import Dtype
from star_jax.errors import UserError
from star_jax.families.fit import check_tokenizer
from star_jax.files import SHIPPED_MODELS
from star_jax.losses import tokens
from star_jax.nn.attention_dispatch import named
from star_jax.nn.kernels import ByScale
from star_jax.parallel import rules
from star_jax.parallel.mesh import batch_shards
from star_jax.protocols import Family, Kernel, PromptEncoder, TokenizerConfig
from star_jax.sampling import program, weight_layout
from star_jax.text.encoder import abstract_encoder
from star_jax.text.encoder_folder import locate
from star_jax.text.hf_config import PUBLISHED
from star_jax.training import build as training_build
from star_jax.training.program import Frozen, StepInputs, TrainingProgram, step_keys
from star_jax.training.run import Run, resolve
from star_jax.training.state import abstract_state

TRAINING_STEP = 'training step'
STATE = ('parameters', 'optimizer', 'averages')  # the resident arrays of a checkpoint


class Program(NamedTuple):
    """A jitted function and how often it runs.

    Attributes:
        function: the function.
        args: its abstract arguments: shapes, dtypes, shardings.
        runs: runs per step, or per batch of images.
    """

    function: Any
    args: tuple
    runs: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """The programs that devices run for one batch, and the arrays that they store.

    Attributes:
        images: images of the batch; of a micro-batch where several make a step.
        micro_batches: how many of them make a step.
        programs: the programs by name; they run one after another, the main one is first.
        resident: abstract arrays that stay in memory, by name.
        trained: the resident parameters that have gradients; None without training.
        counted_programs: the same arithmetic, without kernels that hide it from a count of FLOPs.
        needed_programs: the same results, with nothing computed twice and nothing padded.
        notes: sentences about sizes that were assumed.
    """

    images: int
    micro_batches: int = 1
    programs: dict[str, Program]
    resident: dict[str, Any]
    trained: Any
    counted_programs: dict[str, Program]
    needed_programs: dict[str, Program]
    notes: tuple[str, ...]


# (run, mesh, platform) -> its workload; `attend=` replaces the kernel of the main program.
MakeWorkload = Callable[..., Workload]


def training(
    run: Run, mesh: Mesh | AbstractMesh, platform: str, attend: Kernel | None = None
) -> Workload:
    """A training step, and every program that the run executes beside it.

    Args:
        run: the settings.
        mesh: the devices.
        platform: 'cpu', 'gpu' or 'tpu'.
        attend: the kernel of the main program (None: the one that the run names).

    Raises UserErrors as building the run does, except for paths that this machine does not have.
    """
    check_batch(run.batch, mesh)
    vq, tokenizer_note = _tokenizer(run)
    prompts = _prompts(run.model, run.text, run.text_dtype)
    encoder = prompts.encoder
    inside = run.text_features == 'inside' or not run.model.text_width
    encode_prompts = encoder.apply if inside else None

    def build(**changes: Any) -> TrainingProgram:
        changed = dataclasses.replace(run, **changes)
        return training_build.build_program(
            changed,
            mesh,
            vq.build_training(run.correction),
            platform=platform,
            encode_prompts=encode_prompts,
        )

    step_program, params = build(), run.model.abstract()
    if attend is not None:
        network = run.model.build(run.dtype, run.remat, run.unroll, attend).with_sharding(mesh)
        step_program = dataclasses.replace(step_program, network=network)
    state = abstract_state(step_program.start, step_program.trained(params), mesh)
    tokenizer_params = rules.abstract(vq.abstract(), mesh, ' of the tokenizer')
    encoder_params, base = {}, step_program.base(params)
    if inside:
        encoder_params = rules.abstract(prompts.params, mesh, ' of the text encoder')
    frozen = Frozen(
        tokenizer=tokenizer_params,
        empty=_replicated(prompts.one, mesh),
        encoder=encoder_params,
        base=rules.abstract(base, mesh),
    )
    one = _encoded(vq, run.correction)
    encoded = jax.ShapeDtypeStruct((run.batch, *one.shape[1:]), one.dtype)
    token_ids = encoder.abstract_tokens(run.batch)
    batch = StepInputs(
        encoded=encoded, prompts=token_ids if inside else prompts.condition(run.batch)
    )
    batch = _split_batch(batch, mesh)
    accumulate = run.optimizer.accumulate
    keys_A = jax.eval_shape(lambda: step_keys(jax.random.key(0), 0, accumulate))
    batches = (batch,) * accumulate
    args = (state, frozen, batches, _replicated(keys_A, mesh))
    encoding = {}
    if not run.cache:
        shape = (run.batch, *vq.resolution, 3)
        images = _split_batch(jax.ShapeDtypeStruct(shape, jnp.uint8), mesh)
        encode = jax.jit(step_program.encode, out_shardings=rules.batch_sharding(mesh))
        encoding = {'tokenizer': Program(encode, (tokenizer_params, images), accumulate)}
    resident = {
        'parameters': state.params,
        'optimizer': state.opt,
        'averages': state.ema,
        'frozen model': frozen.base,
        'text encoder': frozen.encoder,
        'tokenizer': frozen.tokenizer,
        'batch': batches,
    }
    countable, needed = build(attention='by_scale'), build(**training_build.COUNTED)
    step = Program(jax.jit(step_program.train, donate_argnums=0), args)
    return Workload(
        images=run.batch,
        micro_batches=accumulate,
        programs={TRAINING_STEP: step} | encoding,
        resident={name: tree for name, tree in resident.items() if jax.tree.leaves(tree)},
        trained=state.params,
        counted_programs={TRAINING_STEP: Program(countable.train, args)} | encoding,
        needed_programs={TRAINING_STEP: Program(needed.train, args)} | encoding,
        notes=tuple(filter(None, (tokenizer_note, prompts.note))),
    )


def sampling(
    run: Run,
    mesh: Mesh | AbstractMesh,
    platform: str,
    attend: Kernel | None = None,
    *,
    buckets: Buckets | None = None,
) -> Workload:
    """Generating a batch of images from encoded text, with the settings of `run.sampling`.

    Args:
        run: the config.
        mesh: the devices, which may be abstract.
        platform: cpu, gpu or tpu.
        attend: the attention kernel (None: the one that the run names).
        buckets: scales that share a program body (None: the default of the platform); the
            arithmetic of their padded rows is not needed.
    """
    check_batch(run.batch, mesh)
    vq, tokenizer_note = _tokenizer(run)
    prompts = _prompts(run.model, run.text, run.text_dtype)
    tokenizer, sizes = vq.build(run.dtype), run.model.schedule.sizes

    def build(attend: Kernel, buckets: Buckets) -> Program:
        network = run.model.build(run.dtype, attend=attend).with_sharding(mesh)
        return Program(program.compile_program(network, tokenizer, buckets), args)

    model_params = rules.abstract(run.model.abstract(), mesh, ' of the model')
    tokenizer_params = rules.abstract(vq.abstract(), mesh, ' of the tokenizer')
    params = program.abstract_cast(
        {'model': model_params, 'tokenizer': tokenizer_params}, run.dtype
    )
    params = weight_layout.arrange(params, run.model.schedule, platform)
    keys_B = jax.eval_shape(lambda: program.image_keys(range(run.batch)))
    keys_B, prompted = _split_batch((keys_B, prompts.condition(run.batch)), mesh)
    inputs = program.inputs(
        run.model,
        run.sampling,
        keys_B=keys_B,
        prompted=prompted,
        empty=_replicated(prompts.one, mesh),
    )
    numbers = (inputs.settings, inputs.method)
    settings, method = _replicated(jax.eval_shape(lambda: numbers), mesh)
    args = (params, inputs.replace(settings=settings, method=method))
    chosen_buckets = choose(buckets, sizes, platform)
    return Workload(
        images=run.batch,
        programs={'sampling': build(attend or named(run.attention, platform), chosen_buckets)},
        resident={
            'parameters': {name: x for name, x in params.items() if name != 'tokenizer'},
            'tokenizer': params['tokenizer'],
        },
        trained=None,
        counted_programs={'sampling': build(ByScale(), chosen_buckets)},
        needed_programs={'sampling': build(ByScale(), ())},
        notes=tuple(filter(None, (tokenizer_note, prompts.note))),
    )


def count_flops(programs: dict[str, Program]) -> dict[str, dict[str, int]]:
    """Floating-point operations of each program per step, by kind (`core.flops`), on all chips."""
    return {
        name: {
            kind: item.runs * count
            for kind, count in count_kinds(item.function, *item.args).items()
        }
        for name, item in programs.items()
    }


def state_bytes(resident: dict[str, int]) -> int:
    """Bytes of the arrays of a checkpoint among those of resident arrays."""
    return sum(resident.get(name, 0) for name in STATE)


def check_batch(batch: int, mesh: Mesh | AbstractMesh) -> None:
    """Raises UserError if the mesh does not divide a batch."""
    ways = batch_shards(mesh)
    if batch % ways:
        nearest = ways * max(round(batch / ways), 1)
        raise UserError(
            f'a batch of {batch} does not divide over data x fsdp = {ways} chips: give a multiple '
            f'of {ways}, such as {nearest}, or put more chips on --mesh.tensor and --mesh.sequence'
        )


def _tokenizer(run: Run) -> tuple[TokenizerConfig, str]:
    """The tokenizer that the run names; otherwise the published one, and a note about it."""
    path, model = resolve(run).tokenizer, run.model
    if path in SHIPPED_MODELS or os.path.isdir(path):
        vq = models.read_tokenizer(path).config.at(model.schedule)
        check_tokenizer(
            model,
            vq,
            where=f'the tokenizer {path} does not fit',
            remedy='give the model the sizes of the tokenizer, or name another tokenizer',
        )
        return vq, ''
    return (
        model.default_tokenizer(),
        f'tokenizer {path} is not on this machine: the published sizes are used',
    )


@functools.lru_cache(maxsize=4)  # a plan builds many workloads of a run
def _encoded(tokenizer: TokenizerConfig, correction: SelfCorrection) -> jax.ShapeDtypeStruct:
    """One image, encoded by a tokenizer for training."""
    images = jax.ShapeDtypeStruct((1, *tokenizer.resolution, 3), jnp.uint8)
    encode = functools.partial(tokens.encode, tokenizer.build_training(correction))
    return jax.eval_shape(encode, nn.unbox(tokenizer.abstract()), images)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Prompts:
    """The encoder of prompts and its abstract arrays, which take a second to trace.

    Attributes:
        encoder: the encoder.
        params: its parameters, boxed with logical axes.
        one: the condition of one prompt.
        note: the assumptions about it ('': none).
    """

    encoder: PromptEncoder
    params: Any
    one: Any
    note: str

    def condition(self, rows: int) -> Any:
        """The conditions of so many prompts."""
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((rows, *leaf.shape[1:]), leaf.dtype), self.one
        )


@functools.lru_cache(maxsize=4)  # a plan builds many workloads of a run
def _prompts(model: Family, text: str, dtype: Dtype) -> _Prompts:
    """The encoder of a run's prompts; a note is added if its sizes are those of a published one."""
    encoder, note = _encoder(model, text, dtype)
    params = encoder.abstract_params()
    one = jax.eval_shape(encoder.apply, nn.unbox(params), encoder.abstract_tokens(1))
    return _Prompts(encoder=encoder, params=params, one=one, note=note)


def _encoder(model: Family, text: str, dtype: Dtype) -> tuple[PromptEncoder, str]:
    width, path = model.text_width, os.path.expanduser(text)
    if not width or os.path.isdir(path):

        def read(*, most: int | None = None) -> PromptEncoder:
            return abstract_encoder(text, locate(text).config, dtype, most)

        return model.prompt_encoder(read), ''
    if width not in PUBLISHED:
        known = ', '.join(map(str, PUBLISHED))
        raise UserError(
            f'the text encoder {text} is not on this machine, and no published encoder has '
            f'width {width} (only {known}): give the path of a folder with --text'
        )
    assume = functools.partial(abstract_encoder, text, PUBLISHED[width], dtype)
    encoder = model.prompt_encoder(assume)
    kind = PUBLISHED[width]['model_type']
    return encoder, f'text encoder: the published {kind} of width {width}, {encoder.length} tokens'


def _replicated(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    return _with_sharding(tree, rules.replicated(mesh))


def _split_batch(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    return _with_sharding(tree, rules.batch_sharding(mesh))


def _with_sharding(tree: Any, sharding: NamedSharding) -> Any:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        nn.unbox(tree),
    )
