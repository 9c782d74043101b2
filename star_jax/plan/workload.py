"""What does a run compute, as far as its sizes tell?

No weights, words or pictures are needed: what a config names and this machine has not counts with
its published sizes.
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
from star_jax.core.classes import Classes
from star_jax.core.flops import count_kinds
from star_jax.errors import UserError
from star_jax.nn.attention_dispatch import named
from star_jax.parallel import rules
from star_jax.parallel.mesh import batch_shards
from star_jax.sampling import program, stable
from star_jax.text import TextEncoder
from star_jax.text.encoder import sketch
from star_jax.text.folder import locate
from star_jax.text.published import PUBLISHED
from star_jax.text.tokens import Tokens
from star_jax.tokenizers.residual_vq import VQ
from star_jax.training.programs import HeadPrograms, Programs
from star_jax.training.run import Run, resolve

STEP = 'training step'


class Piece(NamedTuple):
    """A jitted program and its arguments, by shape, type and sharding."""

    function: Any
    args: tuple


@dataclasses.dataclass(frozen=True)
class Work:
    """What is done with a batch of `images`.

    `pieces` run one after another, the longest first. `resident` lies in memory all the time, by
    what it is; of that `trained` has gradients. `seen`: the same arithmetic in a form that can be
    counted; `needed`: with nothing computed twice. `notes` say what was taken for what.
    """

    images: int
    pieces: dict[str, Piece]
    resident: dict[str, Any]
    trained: Any
    seen: dict[str, Piece]
    needed: dict[str, Piece]
    notes: tuple[str, ...]


Make = Callable[[Run, Mesh | AbstractMesh, str], Work]


def training(run: Run, mesh: Mesh | AbstractMesh, platform: str) -> Work:
    """A training step, with whatever the run computes beside it.

    Raises UserErrors as building the run does, but not for places that are not on this machine.
    """
    check_split(run.batch, mesh)
    vq, about_tokenizer = _tokenizer(run)
    encoder, about_text = _encoder(run)
    label = isinstance(encoder, Classes)
    inside = label or run.features == 'inside'
    kind = HeadPrograms if run.model.refinement else Programs

    def programs(**changes: Any) -> Programs:
        changed = dataclasses.replace(run, **changes)
        return kind(changed, mesh, vq, encoder, inside=inside, platform=platform)

    made, counted = programs(), programs(attention='by_scale')
    state = made.abstract()
    words, features = _condition(encoder, run.batch)
    frozen = {
        'tokenizer': rules.abstract(vq.abstract(), mesh, ' of the tokenizer'),
        'encoder': {},
        'empty': _whole(_condition(encoder, 1)[1], mesh),
    }
    if inside and not label:
        frozen['encoder'] = rules.abstract(encoder.abstract_params(), mesh, ' of the text encoder')
    if isinstance(made, HeadPrograms):
        frozen['base'] = rules.abstract(jax.eval_shape(made.init_base, jax.random.key(0)), mesh)
    codes_BL = jax.ShapeDtypeStruct((run.batch, made.model.schedule.length), jnp.int32)
    batch = _split({'codes': codes_BL, 'text': words if inside else features}, mesh)
    args = (state, frozen, batch, _whole(jax.eval_shape(lambda: jax.random.key(0)), mesh))
    pieces = {STEP: Piece(jax.jit(made.train, donate_argnums=0), args)}
    encoding = {}
    if not run.cache:
        shape = (run.batch, vq.resolution, vq.resolution, 3)
        images = _split(jax.ShapeDtypeStruct(shape, jnp.uint8), mesh)
        encoding = {'tokenizer': Piece(made.encode, (frozen['tokenizer'], images))}
    resident = {
        'parameters': state.params,
        'optimizer': state.opt,
        'averages': state.ema,
        'frozen model': frozen.get('base'),
        'text encoder': frozen['encoder'],
        'tokenizer': frozen['tokenizer'],
        'batch': batch,
    }
    return Work(
        images=run.batch,
        pieces=pieces | encoding,
        resident={name: tree for name, tree in resident.items() if jax.tree.leaves(tree)},
        trained=state.params,
        seen={STEP: Piece(counted.train, args)} | encoding,
        needed={STEP: Piece(made.plain.train, args)} | encoding,
        notes=tuple(filter(None, (about_tokenizer, about_text))),
    )


def sampling(
    run: Run, mesh: Mesh | AbstractMesh, platform: str, buckets: Buckets | None = None
) -> Work:
    """Drawing a batch of images from encoded text, as the run's `sampling` says.

    Scales share `buckets` (by default those that suit the platform), whose padding is not needed.
    """
    check_split(run.batch, mesh)
    vq, about_tokenizer = _tokenizer(run)
    encoder, about_text = _encoder(run)
    tokenizer, sizes = vq.build(run.dtype), run.model.schedule.sizes

    def draws(attention: str, buckets: Buckets) -> Piece:
        attend = named(attention, platform)
        network = run.model.build(run.dtype, attend=attend).with_sharding(mesh)
        return Piece(program.compile_program(network, tokenizer, buckets), args)

    model = rules.abstract(run.model.abstract(), mesh, ' of the model')
    own = rules.abstract(vq.abstract(), mesh, ' of the tokenizer')
    params = _cast({'model': model, 'tokenizer': own}, run.dtype)
    keys_B = jax.eval_shape(lambda: program.image_keys(range(run.batch)))
    text = _condition(encoder, run.batch)[1]
    empty = _whole(_condition(encoder, 1)[1], mesh) if run.sampling.guidance else None
    drawn = stable.arguments(run.sampling, run.model.build(), tokenizer.codes)
    drawn = _whole(jax.eval_shape(lambda: drawn), mesh)
    args = (params, *_split((keys_B, text), mesh), empty, *drawn)
    shared = choose(buckets, sizes, platform)
    return Work(
        images=run.batch,
        pieces={'sampling': draws(run.attention, shared)},
        resident={'parameters': params['model'], 'tokenizer': params['tokenizer']},
        trained=None,
        seen={'sampling': draws('by_scale', shared)},
        needed={'sampling': draws('by_scale', ())},
        notes=tuple(filter(None, (about_tokenizer, about_text))),
    )


def arithmetic(pieces: dict[str, Piece]) -> dict[str, dict[str, int]]:
    """Floating-point operations of each piece on all chips, by kind (`core.flops`)."""
    return {name: count_kinds(piece.function, *piece.args) for name, piece in pieces.items()}


def check_split(batch: int, mesh: Mesh | AbstractMesh) -> None:
    """A UserError if the mesh cannot split a batch."""
    ways = batch_shards(mesh)
    if batch % ways:
        fits = ways * max(round(batch / ways), 1)
        raise UserError(
            f'a batch of {batch} does not divide over data x fsdp = {ways} chips: give a multiple '
            f'of {ways}, such as {fits}, or put more chips on --mesh.tensor and --mesh.sequence'
        )


def share(tree: Any) -> int:
    """Bytes of abstract, placed arrays that one device holds."""
    return sum(
        leaf.dtype.itemsize * _size(leaf.sharding.shard_shape(leaf.shape))
        for leaf in jax.tree.leaves(tree)
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    )


def _size(shape: tuple[int, ...]) -> int:
    return functools.reduce(lambda size, side: size * side, shape, 1)


def _tokenizer(run: Run) -> tuple[VQ, str]:
    """The tokenizer that the run names, or the published one, and a note of the latter."""
    place, model = resolve(run).tokenizer, run.model
    if place == models.SHIPPED or os.path.isdir(place):
        vq = models.read_tokenizer(place).config.at(model.sides)
        for field in ('codes', 'channels'):
            if getattr(model, field) != getattr(vq, field):
                raise UserError(
                    f'model.{field} is {getattr(model, field)}, but the tokenizer {place} has '
                    f'{getattr(vq, field)}: set it so'
                )
        return vq, ''
    vq = VQ(sides=model.sides, codes=model.codes, channels=model.channels)
    return vq, f'{place} is not here: the published tokenizer is counted'


def _encoder(run: Run) -> tuple[TextEncoder | Classes, str]:
    """What reads prompts, and a note where its sizes are those of a published one."""
    if run.model.PROMPT == 'label':
        return Classes(run.model.classes), ''
    width, place = run.model.text_width, os.path.expanduser(run.text)
    if os.path.isdir(place):
        return run.model.prompt_encoder(lambda: sketch(run.text, locate(run.text).config)), ''
    if width not in PUBLISHED:
        known = ', '.join(map(str, PUBLISHED))
        raise UserError(
            f'the text encoder {run.text} is not on this machine, and of width {width} none is '
            f'known (only {known}): name a folder with --text'
        )
    found = sketch(run.text, PUBLISHED[width])
    kind = PUBLISHED[width]['model_type']
    return found, f'text encoder: the published {kind} of width {width}, {found.length} tokens'


def _condition(encoder: TextEncoder | Classes, rows: int) -> tuple[Any, Any]:
    """What a host and what an encoder make of so many prompts, abstract."""
    if isinstance(encoder, Classes):
        labels = jax.eval_shape(lambda: encoder.encode([''] * rows))
        return labels, labels
    ids_BT = jax.ShapeDtypeStruct((rows, encoder.length), jnp.int32)
    tokens = Tokens(ids_BT=ids_BT, mask_BT=ids_BT)
    params = nn.unbox(encoder.abstract_params())
    return tokens, jax.eval_shape(encoder.apply, params, tokens)


def _cast(params: dict, dtype: str) -> dict:
    """`program.cast`, of what has a place."""
    types = jax.eval_shape(functools.partial(program.cast, dtype=dtype), params)
    return jax.tree.map(
        lambda leaf, new: jax.ShapeDtypeStruct(leaf.shape, new.dtype, sharding=leaf.sharding),
        params,
        types,
    )


def _whole(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    return _placed(tree, rules.replicated(mesh))


def _split(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    return _placed(tree, rules.batch_sharding(mesh))


def _placed(tree: Any, where: NamedSharding) -> Any:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), nn.unbox(tree)
    )
