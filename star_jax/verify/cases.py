"""What does a case folder contain, and how does it become our configs and parameters?

`config.json` with the option names of the original code, `io.safetensors` with the recorded arrays,
and in most kinds a state dict with the original tensor names. The conversion tables of `convert`
turn state dicts into parameters.
"""

import dataclasses
import functools
import gzip
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import einops
import numpy as np
import safetensors
import safetensors.numpy

from star_jax import files
from star_jax.checkpoint import config as configs
from star_jax.checkpoint import weights
from star_jax.convert.entries import Entry, to_params
from star_jax.convert.star import IGNORED, star_entries, vq_entries
from star_jax.convert.var import BUFFERS, var_entries
from star_jax.core.schedule import square_grids
from star_jax.errors import UserError
from star_jax.families.star import Refinement, Star
from star_jax.families.var import Var
from star_jax.nn.positions import Learned, NormalisedRotary, RawRotary
from star_jax.tokenizers.autoencoder import Autoencoder
from star_jax.tokenizers.residual_vq import VQ, phi_of_scale
from star_jax.verify import options
from star_jax.verify.star_options import OPTIONS

STATE = 'state_dict.safetensors'  # where the config names no file
MOST_BYTES = 2**33  # bytes of the arrays of a case
AFTER = 'state_dict_after'
QUANTISER = 'quantize.'  # prefix of the quantiser's tensors
RAW = -1  # the rope_norm of coordinates in cells


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A recorded case.

    Attributes:
        folder: folder of the case.
        config: content of its `config.json`.
        arrays: recorded arrays by name, and the tensors of `state_dict_after` under this prefix.
        marks: the tolerances of its family; None where each config has its own.
    """

    folder: Path
    config: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray]
    marks: Mapping[str, float] | None = None

    @property
    def path(self) -> Path:
        """The file of the config."""
        return self.folder / 'config.json'

    def option(self, *path: str) -> Any:
        """The option at the end of a path of keys.

        Raises:
            UserError: the config lacks it.
        """
        value = self.config
        for key in path:
            if not isinstance(value, Mapping) or key not in value:
                raise UserError(f'{self.path}: {".".join(path)} is missing')
            value = value[key]
        return value

    def optional(self, name: str, default: Any = None) -> Any:
        """A top-level option, or the default if the config lacks it."""
        return self.config.get(name, default)

    def check(self, name: str, implemented: Any) -> None:
        """Raises UserError if the config has the option with a value that is not implemented."""
        if self.config.get(name) is not None:
            options.check_value(self.path, name, self.config[name], implemented)

    def input(self, name: str) -> np.ndarray:
        """A recorded input.

        Raises:
            UserError: the case lacks it.
        """
        if name not in self.arrays:
            raise UserError(f'{self.folder}: the recorded input {name!r} is missing')
        return self.arrays[name]

    @property
    def tolerances(self) -> Mapping[str, float | str]:
        return self.option('tolerances') if self.marks is None else self.marks

    @functools.cached_property
    def state(self) -> dict[str, np.ndarray]:
        """The state dict, in the original names."""
        file = self.optional('state_dict_file', STATE)
        if not isinstance(file, str):
            raise UserError(f'{self.folder}: this kind of case needs a state_dict_file')
        return read_arrays(self.folder / file)

    @functools.cached_property
    def tokenizer(self) -> tuple[VQ, dict]:
        """Config and parameters of the tokenizer that this case names, at its own scales."""
        path = self.folder / self.option('vae_config')
        other = Case(path.parent, _read_config(path), {})
        OPTIONS['vqvae'].check(other.config, path)
        vq = dataclasses.replace(vq_config(other), grids=square_grids(self.option('patch_nums')))
        state = read_arrays(self.folder / self.option('vae_state_dict'))
        return vq, convert(self, vq_entries(vq, state), state)


def read_case(folder: Path) -> Case:
    """Reads the case in `folder`.

    Raises:
        UserError: a file is missing or damaged.
    """
    config = _read_config(folder / 'config.json')
    arrays = read_arrays(folder / 'io.safetensors')
    for name in config.get('files') or ():
        if not _exists(folder / name):
            raise UserError(f'{folder / name}: there is no such file, but config.json lists it')
    after = folder / f'{AFTER}.safetensors'
    if _exists(after):
        arrays |= {f'{AFTER}.{name}': array for name, array in read_arrays(after).items()}
    return Case(folder, config, arrays)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Reads a safetensors file, or the gzipped file beside it whose name ends with `.gz`.

    Raises:
        UserError: both are missing, or the file is damaged.
    """
    gzipped = path if path.suffix == '.gz' else _gzipped(path)
    if gzipped != path and (path.exists() or not gzipped.exists()):
        return weights.flatten(weights.load(path))
    files.check_regular(gzipped)
    try:
        with gzip.open(gzipped) as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise UserError(f'{gzipped} has more than {MOST_BYTES:,} bytes, so it is not a case')
        return safetensors.numpy.load(content)
    except (OSError, EOFError, zlib.error, safetensors.SafetensorError) as error:
        raise UserError(f'{gzipped}: cannot be read as gzipped safetensors ({error})') from error


def convert(
    case: Case,
    entries: Sequence[Entry],
    state: Mapping[str, np.ndarray],
    ignored: tuple[str, ...] = IGNORED + BUFFERS,
) -> dict:
    """Converts a state dict to parameters; tensors whose names end with `ignored` are skipped.

    Raises:
        UserError: names the tensors that the state dict lacks or that no table lists.
    """
    try:
        conversion = to_params(entries, state, ignored)
    except einops.EinopsError as error:
        raise UserError(
            f'{case.folder}: the state dict does not fit the config: {error}'
        ) from error
    faults = {'it lacks': conversion.missing, 'unknown are': conversion.unknown}
    if any(faults.values()):
        named = '; '.join(f'{what} {", ".join(names)}' for what, names in faults.items() if names)
        raise UserError(f'{case.folder}: the state dict does not fit the config: {named}')
    return conversion.params


def star_params(case: Case, star: Star) -> dict:
    return convert(case, star_entries(star), case.state)


def var_params(case: Case, var: Var) -> dict:
    return convert(case, var_entries(var), case.state)


def quantiser_entries(vq: VQ, names: Iterable[str]) -> list[Entry]:
    """The entries of a tokenizer's table for codebook and phi."""
    return [entry for entry in vq_entries(vq, names) if entry.torch_name.startswith(QUANTISER)]


def star_config(case: Case) -> Star:
    """The STAR transformer of the original options."""
    option = case.option
    positions = Learned()
    if option('rotary_pos_emb'):
        theta, extent = option('rope_theta'), option('rope_norm')
        raw = extent == RAW
        positions = RawRotary(theta=theta) if raw else NormalisedRotary(theta=theta, extent=extent)
    refinement = None
    if case.optional('enable_adaptive_norm'):  # the original name of the refinement head
        first, blocks = option('sample_from_idx'), case.optional('feat_extract_blocks', 3)
        case.check('refine_from_scale_index', first)
        refinement = build(case, Refinement, first=first, blocks=blocks)
    return build(
        case,
        Star,
        depth=option('depth'),
        width=option('embed_dim'),
        heads=option('num_heads'),
        mlp_ratio=option('mlp_ratio'),
        sides=tuple(option('patch_nums')),
        codes=option('vocab_size'),
        channels=option('Cvae'),
        text_width=option('in_dim_cross'),
        positions=positions,
        level_embedding=option('absolute_lvl_emb'),
        shared_adaln=option('shared_aln'),
        qk_norm=option('attn_l2_norm'),
        logit_norm=option('enable_logit_norm'),
        cross_attention=option('enable_cross'),
        refinement=refinement,
    )


def var_config(case: Case) -> Var:
    """The class-conditional transformer of the original options."""
    option = case.option
    return build(
        case,
        Var,
        depth=option('depth'),
        width=option('embed_dim'),
        heads=option('num_heads'),
        mlp_ratio=option('mlp_ratio'),
        sides=tuple(option('patch_nums')),
        codes=option('vocab_size'),
        channels=option('Cvae'),
        classes=option('num_classes'),
        shared_adaln=option('shared_aln'),
        qk_norm=option('attn_l2_norm'),
    )


def vq_config(case: Case) -> VQ:
    """The tokenizer of the original options, with its autoencoder."""
    option = case.option
    autoencoder = build(
        case,
        Autoencoder,
        width=option('ch'),
        multipliers=tuple(option('ch_mult')),
        blocks=option('num_res_blocks'),
        groups=option('groupnorm_groups'),
    )
    case.check('downsample', autoencoder.downsampling)
    return dataclasses.replace(quantiser_config(case), autoencoder=autoencoder)


def quantiser_config(case: Case) -> VQ:
    """A tokenizer for its quantiser alone; the autoencoder is as small as possible and unused."""
    option = case.option
    grids = square_grids(option('v_patch_nums'))
    shared = option('share_quant_resi')  # 0: one phi per scale, or default_qresi_counts of them
    vq = build(
        case,
        VQ,
        autoencoder=Autoencoder(width=1, multipliers=(1,), blocks=1, groups=1),
        grids=grids,
        codes=option('vocab_size'),
        channels=option('Cvae'),
        phis=shared or case.optional('default_qresi_counts') or len(grids),
        phi_ratio=option('quant_resi'),
        normalised=option('using_znorm'),
    )
    case.check('phi_index_per_scale', list(phi_of_scale(vq.phis, len(grids))))
    return vq


def build(case: Case, make: Callable[..., Any], **fields: Any) -> Any:
    """A config with these fields; UserError where they do not fit."""
    try:
        return make(**fields)
    except (TypeError, ValueError) as error:
        raise UserError(f'{case.path}: {error}') from error


def _read_config(path: Path) -> dict[str, Any]:
    config = configs.read_json(path)
    if not isinstance(config, dict):
        raise UserError(f'{path}: expected an object of options')
    return config


def _gzipped(path: Path) -> Path:
    return path.with_name(f'{path.name}.gz')


def _exists(path: Path) -> bool:
    return path.exists() or _gzipped(path).exists()
