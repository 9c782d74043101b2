"""Which model do the names and shapes of a published file describe?"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from star_jax.checkpoint.stored import Form
from star_jax.core.schedule import Grids, square_grids
from star_jax.errors import UserError
from star_jax.families.star import Refinement, Star
from star_jax.families.var import Var
from star_jax.nn.positions import Learned, NormalisedRotary, RawRotary
from star_jax.tokenizers.autoencoder import Autoencoder
from star_jax.tokenizers.residual_vq import VQ

# The published sides of each image size in px (STAR specification 7).
SIDES = {
    256: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    512: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
    1024: (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),
}
HEAD_WIDTH = 64  # of every published transformer
RAW = -1.0  # the originals' rope_norm for coordinates that count cells

Forms = Mapping[str, Form]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unsaid:
    """What a published file does not contain; the defaults are those of the published models.

    Attributes:
        size: image side in px, which determines the scales (0: the smallest that fits the number of
            scales and of positions).
        sides: side of each scale in tokens, for a model with other scales than the published ones.
        heads: attention heads, if the file has no score scales (0: one per 64 channels).
        theta: base of the rotary frequencies.
        extent: largest rotary coordinate, the published rope_norm (-1: coordinates count cells).
        logit_norm: normalise features before the projection to logits.
        first_refined: first scale of the refinement head, counted from 0.
        groups: groups of the tokenizer's group norms.
        normalised: the tokenizer looks codes up by direction (z-norm) instead of distance.
        released: sample the model with the cross-attention of the published code.
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
    released: bool = False

    def __post_init__(self) -> None:
        if self.size and self.size not in SIDES:
            raise ValueError(f'size is one of {", ".join(map(str, SIDES))} px, not {self.size}')
        if self.size and self.sides:
            raise ValueError('give size or sides, not both')


def transformer(forms: Forms, unsaid: Unsaid) -> Star | Var:
    """The config of a transformer's state dict. Raises UserError where nothing fits."""
    _require(forms, 2, 'word_embed.weight', 'lvl_embed.weight', 'blocks.0.ffn.fc1.weight')
    width, channels = forms['word_embed.weight'].shape
    family = Var if 'head_nm.ada_lin.1.weight' in forms else Star
    fields = {
        'depth': _count(forms, 'blocks'),
        'width': width,
        'heads': _heads(forms, width, unsaid),
        'mlp_ratio': forms['blocks.0.ffn.fc1.weight'].shape[0] / width,
        'sides': _sides(forms, unsaid),
        'channels': channels,
        'qk_norm': 'blocks.0.attn.scale_mul_1H11' in forms,
        'shared_adaln': 'blocks.0.ada_gss' in forms,
    }
    more = _var_fields(forms) if family is Var else _star_fields(forms, unsaid)
    return _valid(family, **fields, **more)


def tokenizer(forms: Forms, unsaid: Unsaid, grids: Grids = ()) -> VQ:
    """The config of a tokenizer's state dict, for these `grids` if any are given."""
    _require(forms, 4, 'encoder.conv_in.weight')
    _require(forms, 2, 'quantize.embedding.weight')
    width = forms['encoder.conv_in.weight'].shape[0]
    levels = _count(forms, 'encoder.down')
    first_convs = [f'encoder.down.{level}.block.0.conv1.weight' for level in range(levels)]
    _require(forms, 4, *first_convs)
    codes, channels = forms['quantize.embedding.weight'].shape
    autoencoder = _valid(
        Autoencoder,
        width=width,
        multipliers=tuple(forms[name].shape[0] // width for name in first_convs),
        blocks=_count(forms, 'encoder.down.0.block'),
        groups=unsaid.groups,
    )
    phis = _count(forms, 'quantize.quant_resi.qresi_ls') or _count(forms, 'quantize.quant_resi')
    return _valid(
        VQ,
        autoencoder=autoencoder,
        grids=grids or square_grids(unsaid.sides or SIDES[unsaid.size or 256]),
        codes=codes,
        channels=channels,
        phis=phis or 1,
        normalised=unsaid.normalised,
    )


def _star_fields(forms: Forms, unsaid: Unsaid) -> dict[str, Any]:
    _require(forms, 2, 'head_logits.weight', 'encoder_proj.weight')
    rotary = RawRotary(theta=unsaid.theta)
    if unsaid.extent != RAW:
        rotary = NormalisedRotary(theta=unsaid.theta, extent=unsaid.extent)
    refinement = None
    if blocks := _count(forms, 'feat_extract_blocks'):
        scales = forms['lvl_embed.weight'].shape[0]
        if not 0 < unsaid.first_refined < scales:
            raise UserError(
                f'the file has {scales} scales, and its refinement head cannot begin with scale '
                f'{unsaid.first_refined}: say with --first-refined where it does'
            )
        refinement = Refinement(first=unsaid.first_refined, blocks=blocks)
    return {
        'codes': forms['head_logits.weight'].shape[0],
        'text_width': forms['encoder_proj.weight'].shape[1],
        'positions': Learned() if 'pos_1LC' in forms else rotary,
        'cross_attention': 'blocks.0.cross_attn.mat_q.weight' in forms,
        'logit_norm': unsaid.logit_norm,
        'released_cross_attention': unsaid.released,
        'refinement': refinement,
    }


def _var_fields(forms: Forms) -> dict[str, Any]:
    _require(forms, 2, 'head.weight', 'class_emb.weight')
    _require(forms, 3, 'pos_1LC')
    return {
        'codes': forms['head.weight'].shape[0],
        'classes': forms['class_emb.weight'].shape[0] - 1,
    }


def _sides(forms: Forms, unsaid: Unsaid) -> tuple[int, ...]:
    """The scales: those that were named, or the smallest published ones that fit the file."""
    scales = forms['lvl_embed.weight'].shape[0]
    rows = None
    if 'pos_1LC' in forms:
        _require(forms, 3, 'pos_1LC')
        rows = forms['pos_1LC'].shape[1]
    named = unsaid.sides or SIDES.get(unsaid.size)
    for sides in [named] if named else SIDES.values():
        if len(sides) == scales and rows in (None, sum(side**2 for side in sides)):
            return tuple(sides)
    length = f' and {rows:,} positions' if rows else ''
    given = f'not the scales {" ".join(map(str, named))}' if named else 'as no published model'
    raise UserError(
        f'the file has {scales} scales{length}, {given}: name its sides, such as --sides 1 2 3 4'
    )


def _heads(forms: Forms, width: int, unsaid: Unsaid) -> int:
    if (scale := 'blocks.0.attn.scale_mul_1H11') in forms:
        _require(forms, 4, scale)
        return forms[scale].shape[1]
    return unsaid.heads or max(width // HEAD_WIDTH, 1)


def _count(forms: Forms, prefix: str) -> int:
    """How many members `prefix.0.`, `prefix.1.`, ... there are."""
    numbers = (re.match(rf'{re.escape(prefix)}\.(\d+)\.', name) for name in forms)
    return max((int(found[1]) for found in numbers if found), default=-1) + 1


def _require(forms: Forms, rank: int, *names: str) -> None:
    """Raises UserError unless these are there, not empty, and of so many axes."""
    missing = [name for name in names if not math.prod(forms[name].shape if name in forms else [0])]
    if missing:
        raise UserError(f'the file lacks {", ".join(missing)}, without which nothing can be told')
    for name in names:
        if len(shape := forms[name].shape) != rank:
            raise UserError(f'{name} has the shape {list(shape)}, expected {rank} axes')


def _valid(make: Any, **fields: Any) -> Any:
    try:
        return make(**fields)
    except ValueError as error:
        raise UserError(f'the shapes of the file fit no model ({error})') from error
