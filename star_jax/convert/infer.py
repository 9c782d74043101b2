"""Which model config do the names and shapes of a published file have?"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from star_jax.checkpoint.stored import TensorSpec
from star_jax.core.schedule import Grids, square_grids
from star_jax.core.templates import PUBLISHED, RESOLUTIONS
from star_jax.errors import UserError
from star_jax.families import llamagen
from star_jax.families.infinity import Infinity, hidden_channels
from star_jax.families.llamagen import LlamaGen, LlamaGenText
from star_jax.families.star import Refinement, Star
from star_jax.families.var import Var
from star_jax.nn.positions import (
    Learned,
    NormalisedRotary,
    RasterRotary,
    RawRotary,
    ReferenceRotary,
)
from star_jax.protocols import Family
from star_jax.tokenizers.autoencoder import Autoencoder
from star_jax.tokenizers.raster_vq import RasterVQ
from star_jax.tokenizers.residual_bsq import BSQ
from star_jax.tokenizers.residual_vq import VQ
from star_jax.tokenizers.sign_quantiser import PATCH

# The published sides of each image size in px (STAR specification 7).
SIDES = {
    256: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    512: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
    1024: (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),
}
# The square grids of Infinity of each image size in px (Infinity specification 2.1).
SQUARES = {
    16 * grids[-1][0]: grids
    for grids in (PUBLISHED.by_name['1.0'][:n] for n in RESOLUTIONS.values())
}
# Tokens along a side for each image size in px of a raster (LlamaGen specification 2.1).
TOKENS = {256: 16, 384: 24, 512: 32}
SIZES = sorted({*SIDES, *SQUARES, *TOKENS})
HEAD_WIDTH = 64  # channels of a head in every published STAR and VAR
PATCHED = 8  # px a cell of the published tokenizer whose tokens are 2 x 2 cells
RAW = -1.0  # the published rope_norm of coordinates in cells

Specs = Mapping[str, TensorSpec]
T = TypeVar('T')


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Fields that a published file lacks; the defaults are those of the published models.

    Attributes:
        size: image side in px, which determines the scales (0: the smallest that fits the number of
            scales and of positions; 1024 for Infinity, 256 for LlamaGen).
        sides: side of each scale in tokens, for a model with other scales than the published ones.
        heads: attention heads, if the file has no score scales (0: those of the published model of
            this size, or one per 64 channels).
        theta: base of the rotary frequencies.
        extent: largest rotary coordinate, the published rope_norm (-1: coordinates count cells).
        logit_norm: normalise features before the projection to logits.
        first_refined: first scale of the refinement head, counted from 0.
        groups: groups of the tokenizer's group norms.
        normalised: the tokenizer looks codes up by direction (z-norm) instead of distance.
        raw_vectors: LlamaGen's tokenizer was trained without l2-normalised vectors.
        released_cross_attention: sample the model with the cross-attention of the published code.
    """

    size: int = 0
    sides: tuple[int, ...] = ()
    heads: int = 0
    theta: float = 10000.0
    extent: float = 64.0
    logit_norm: bool = True
    first_refined: int = 9
    groups: int = 32
    normalised: bool = False
    raw_vectors: bool = False
    released_cross_attention: bool = False

    def __post_init__(self) -> None:
        if self.size and self.size not in SIZES:
            raise UserError(f'size is one of {", ".join(map(str, SIZES))} px, not {self.size}')
        if self.size and self.sides:
            raise UserError('give size or sides, not both')


def transformer(specs: Specs, options: ModelOptions) -> Family:
    """The config of a transformer, from the names and shapes of its state dict.

    Raises:
        UserError: no config has these tensors.
    """
    if 'cfg_uncond' in specs:
        return _infinity(specs, options)
    if 'tok_embeddings.weight' in specs:
        return _llamagen(specs, options)
    _require(specs, 2, 'word_embed.weight', 'lvl_embed.weight', 'blocks.0.ffn.fc1.weight')
    width, channels = specs['word_embed.weight'].shape
    family = Var if 'head_nm.ada_lin.1.weight' in specs else Star
    fields = {
        'depth': _count(specs, 'blocks'),
        'width': width,
        'heads': _heads(specs, 'blocks.0.attn.scale_mul_1H11', width, options),
        'mlp_ratio': specs['blocks.0.ffn.fc1.weight'].shape[0] / width,
        'sides': _sides(specs, options),
        'channels': channels,
        'qk_norm': 'blocks.0.attn.scale_mul_1H11' in specs,
        'shared_adaln': 'blocks.0.ada_gss' in specs,
    }
    more = _var_fields(specs) if family is Var else _star_fields(specs, options)
    return _build(family, **fields, **more)


def tokenizer(
    specs: Specs, options: ModelOptions, model: Family | None = None
) -> VQ | BSQ | RasterVQ:
    """The config of a tokenizer, from the names and shapes of its state dict.

    Args:
        specs: shapes and types of the tensors.
        options: the fields that the file does not contain.
        model: the transformer with the same scales (None: those of the options).

    Raises:
        UserError: no config has these tensors.
    """
    grids = model.schedule.grids if model else ()
    if 'quantize.embedding.weight' not in specs:
        return _bsq(specs, options, model)
    _require(specs, 4, 'encoder.conv_in.weight')
    _require(specs, 2, 'quantize.embedding.weight')
    if any(name.startswith('encoder.conv_blocks.') for name in specs):
        return _raster_vq(specs, options, model)
    width = specs['encoder.conv_in.weight'].shape[0]
    levels = _count(specs, 'encoder.down')
    first_convs = [f'encoder.down.{level}.block.0.conv1.weight' for level in range(levels)]
    _require(specs, 4, *first_convs)
    codes, channels = specs['quantize.embedding.weight'].shape
    autoencoder = _build(
        Autoencoder,
        width=width,
        multipliers=tuple(specs[name].shape[0] // width for name in first_convs),
        blocks=_count(specs, 'encoder.down.0.block'),
        groups=options.groups,
    )
    phis = _count(specs, 'quantize.quant_resi.qresi_ls') or _count(specs, 'quantize.quant_resi')
    return _build(
        VQ,
        autoencoder=autoencoder,
        grids=grids or square_grids(options.sides or _of_size(SIDES, options, 256)),
        codes=codes,
        channels=channels,
        phis=phis or 1,
        normalised=options.normalised,
    )


def _infinity(specs: Specs, options: ModelOptions) -> Infinity:
    """The fields that a file lacks: scales, positions, the layers that add the level embedding."""
    _require(specs, 2, 'word_embed.weight', 'cfg_uncond')
    chunks = _count(specs, 'block_chunks')
    first = 'block_chunks.0.module.0' if chunks else 'blocks.0'
    depth = chunks * _count(specs, 'block_chunks.0.module') if chunks else _count(specs, 'blocks')
    _require(specs, 2, f'{first}.ffn.fc1.weight')
    width, bits = specs['word_embed.weight'].shape
    rows, text_width = specs['cfg_uncond'].shape
    hidden = specs[f'{first}.ffn.fc1.weight'].shape[0]
    modulated = 'head_nm.ada_lin.1.weight' in specs
    grids, reference = _grids(options), (0, 0) if options.sides else PUBLISHED.by_name['1.0'][-1]
    swiglu = f'{first}.ffn.fcg.weight' in specs
    ratio = Infinity.mlp_ratio
    if hidden_channels(width, ratio, swiglu) != hidden:
        ratio = (1.5 if swiglu else 1) * hidden / width
    layers = 'head.3.weight' if not modulated else 'head.2.weight'
    return _build(
        Infinity,
        depth=depth,
        width=width,
        heads=_heads(specs, f'{first}.sa.scale_mul_1H11', width, options),
        mlp_ratio=ratio,
        bits=bits,
        grids=grids,
        reference=reference,
        text_width=text_width,
        text_rows=rows,
        positions=ReferenceRotary(theta=options.theta),
        shared_adaln=f'{first}.ada_gss' in specs,
        modulated_head=modulated,
        head_layers=2 if layers in specs else 1,
        qk_norm=f'{first}.sa.scale_mul_1H11' in specs,
        rms_norm=f'{first}.ca_norm.bias' not in specs,
        swiglu=swiglu,
        input_norm='norm0_ve.weight' in specs,
        cross_scale=0.0 if f'{first}.ca_gamma' in specs else -1.0,
    )


def _llamagen(specs: Specs, options: ModelOptions) -> LlamaGen | LlamaGenText:
    """The fields that a file lacks: heads, the grid, and positions."""
    first = 'layers.0.attention.wqkv.weight'
    _require(specs, 2, 'tok_embeddings.weight', first, 'layers.0.feed_forward.w1.weight')
    codes, width = specs['tok_embeddings.weight'].shape
    depth = _count(specs, 'layers')
    published = {(layers, size): heads for layers, heads, size in llamagen.SIZES.values()}
    heads = options.heads or published.get((depth, width))
    if heads is None:
        raise UserError(
            f'no published LlamaGen has {depth} layers of {width} channels, and the file does not '
            'tell the heads: give them with --heads'
        )
    rows, inner = specs[first].shape[0], width // heads
    kv_heads, rest = divmod(rows - width, 2 * max(inner, 1))
    if rest:
        raise UserError(
            f'{first} has {rows} rows, which do not fit {heads} heads of {inner} channels with '
            'their keys and values: give the heads with --heads'
        )
    side = TOKENS.get(options.size or 256)
    if options.sides:
        side, *more = options.sides
        if more:
            raise UserError(f'a LlamaGen has one scale, not the {1 + len(more)} of --sides')
    if side is None:
        raise UserError(f'no published model of this kind makes images of {options.size} px')
    fields = {
        'depth': depth,
        'width': width,
        'heads': heads,
        'kv_heads': 0 if kv_heads == heads else kv_heads,
        'hidden': specs['layers.0.feed_forward.w1.weight'].shape[0],
        'grid': (side, side),
        'codes': codes,
        'positions': RasterRotary(theta=options.theta),
    }
    if (classes := 'cls_embedding.embedding_table.weight') in specs:
        _require(specs, 2, classes)
        return _build(LlamaGen, classes=specs[classes].shape[0] - 1, **fields)
    _require(specs, 2, 'cls_embedding.uncond_embedding')
    rows, text_width = specs['cls_embedding.uncond_embedding'].shape
    return _build(LlamaGenText, text_rows=rows, text_width=text_width, **fields)


def _bsq(specs: Specs, options: ModelOptions, model: Family | None) -> BSQ:
    """The tokens of a transformer with four times the bits of a cell are 2 x 2 cells."""
    wrapped = 'encoder.conv_in.conv.weight' in specs
    conv = '.conv' if wrapped else ''
    _require(specs, 4, f'encoder.conv_in{conv}.weight', f'encoder.conv_out{conv}.weight')
    width = specs[f'encoder.conv_in{conv}.weight'].shape[0]
    features = bits = specs[f'encoder.conv_out{conv}.weight'].shape[0]
    first = [
        f'encoder.down.{level}.block.0.conv1{conv}.weight'
        for level in range(_count(specs, 'encoder.down'))
    ]
    _require(specs, 4, *first)
    if (projection := 'quantizer.project_in.weight') in specs:
        _require(specs, 2, projection)
        bits = specs[projection].shape[0]
    autoencoder = _build(
        Autoencoder,
        width=width,
        multipliers=tuple(specs[name].shape[0] // width for name in first),
        blocks=_count(specs, 'encoder.down.0.block'),
        groups=0,
        attention=False,
    )
    grids, patchify = _grids(options), autoencoder.downsampling == PATCHED
    if model:
        grids, patchify = model.schedule.grids, model.vector_width == PATCH**2 * bits
    return _build(
        BSQ,
        autoencoder=autoencoder,
        grids=grids,
        bits=bits,
        patchify=patchify,
        features=0 if features == bits else features,
        normalised='quantizer.layernorm.weight' in specs,
    )


def _raster_vq(specs: Specs, options: ModelOptions, model: Family | None) -> RasterVQ:
    """The fields that a file lacks: the grid, and whether vectors are normalised."""
    if len(options.sides) > 1:
        raise UserError(
            f'this tokenizer has one scale, and sides are {options.sides}: give the side of its '
            'grid in tokens, or the image size with --size'
        )
    blocks = 'encoder.conv_blocks'
    levels = _count(specs, blocks)
    first = [f'{blocks}.{level}.res.0.conv1.weight' for level in range(levels)]
    _require(specs, 4, 'encoder.conv_out.weight', *first)
    width = specs['encoder.conv_in.weight'].shape[0]
    autoencoder = _build(
        Autoencoder,
        width=width,
        multipliers=tuple(specs[name].shape[0] // width for name in first),
        blocks=_count(specs, f'{blocks}.0.res'),
        groups=options.groups,
        fused_attention=False,
        latent=specs['encoder.conv_out.weight'].shape[0],
    )
    codes, channels = specs['quantize.embedding.weight'].shape
    side = (options.size or 256) // autoencoder.downsampling
    grid = (options.sides * 2) or (side, side)
    return _build(
        RasterVQ,
        autoencoder=autoencoder,
        grid=model.schedule.grids[0] if model else grid,
        codes=codes,
        channels=channels,
        normalised=not options.raw_vectors,
    )


def _grids(options: ModelOptions) -> Grids:
    """The scales of an Infinity, which no file contains."""
    if options.sides:
        return square_grids(options.sides)
    return _of_size(SQUARES, options, 1024)


def _of_size(table: Mapping[int, T], options: ModelOptions, default: int) -> T:
    """The entry of the options' size. Raises UserError where no published model has it."""
    size = options.size or default
    if size not in table:
        raise UserError(f'no published model of this kind makes images of {size} px')
    return table[size]


def _star_fields(specs: Specs, options: ModelOptions) -> dict[str, Any]:
    _require(specs, 2, 'head_logits.weight', 'encoder_proj.weight')
    rotary = RawRotary(theta=options.theta)
    if options.extent != RAW:
        rotary = NormalisedRotary(theta=options.theta, extent=options.extent)
    refinement = None
    if blocks := _count(specs, 'feat_extract_blocks'):
        scales = specs['lvl_embed.weight'].shape[0]
        if not 0 < options.first_refined < scales:
            raise UserError(
                f'the file has {scales} scales, and its refinement head cannot start at scale '
                f'{options.first_refined}: give the first refined scale with --first-refined'
            )
        refinement = Refinement(first=options.first_refined, blocks=blocks)
    return {
        'codes': specs['head_logits.weight'].shape[0],
        'text_width': specs['encoder_proj.weight'].shape[1],
        'positions': Learned() if 'pos_1LC' in specs else rotary,
        'cross_attention': 'blocks.0.cross_attn.mat_q.weight' in specs,
        'logit_norm': options.logit_norm,
        'released_cross_attention': options.released_cross_attention,
        'refinement': refinement,
    }


def _var_fields(specs: Specs) -> dict[str, Any]:
    _require(specs, 2, 'head.weight', 'class_emb.weight')
    _require(specs, 3, 'pos_1LC')
    return {
        'codes': specs['head.weight'].shape[0],
        'classes': specs['class_emb.weight'].shape[0] - 1,
    }


def _sides(specs: Specs, options: ModelOptions) -> tuple[int, ...]:
    """The sides of the options, or the smallest published ones that fit the file."""
    scales = specs['lvl_embed.weight'].shape[0]
    rows = None
    if 'pos_1LC' in specs:
        _require(specs, 3, 'pos_1LC')
        rows = specs['pos_1LC'].shape[1]
    if options.size and options.size not in SIDES:
        raise UserError(f'no published model of this kind makes images of {options.size} px')
    expected = options.sides or SIDES.get(options.size)
    for sides in [expected] if expected else SIDES.values():
        if len(sides) == scales and rows in (None, sum(side**2 for side in sides)):
            return tuple(sides)
    length = f' and {rows:,} positions' if rows else ''
    reason = 'which no published model has'
    if expected:
        reason = f'which does not fit the sides {" ".join(map(str, expected))}'
    raise UserError(
        f'the file has {scales} scales{length}, {reason}: give its sides, such as --sides 1 2 3 4'
    )


def _heads(specs: Specs, scale: str, width: int, options: ModelOptions) -> int:
    """The heads of the score scales `scale`, or those of the options."""
    if scale in specs:
        _require(specs, 4, scale)
        return specs[scale].shape[1]
    return options.heads or max(width // HEAD_WIDTH, 1)


def _count(specs: Specs, prefix: str) -> int:
    """The number of members `prefix.0.`, `prefix.1.`, ..."""
    matches = (re.match(rf'{re.escape(prefix)}\.(\d{{1,9}})\.', name) for name in specs)
    count = max((int(match[1]) for match in matches if match), default=-1) + 1
    if count > len(specs):
        raise UserError(
            f'the file has a tensor of {prefix}.{count - 1} and only {len(specs):,} tensors in '
            'all, so most of the others are missing'
        )
    return count


def _require(specs: Specs, rank: int, *names: str) -> None:
    """Raises UserError unless these tensors exist, have elements, and have `rank` axes."""
    missing = [name for name in names if not math.prod(specs[name].shape if name in specs else [0])]
    if missing:
        raise UserError(f'the file lacks {", ".join(missing)}, from which the config is inferred')
    for name in names:
        if len(shape := specs[name].shape) != rank:
            raise UserError(f'{name} has the shape {list(shape)}, expected {rank} axes')


def _build(make: Callable[..., T], *args: Any, **fields: Any) -> T:
    try:
        return make(*args, **fields)
    except ValueError as error:
        raise UserError(f'the shapes of the file fit no model ({error})') from error
