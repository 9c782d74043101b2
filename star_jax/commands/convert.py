"""`star-jax convert FILE|FOLDER --out FOLDER`"""

import collections
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

import tyro
from rich.table import Table

from star_jax import files
from star_jax.commands import arguments
from star_jax.console import Console, pairs
from star_jax.convert import transfer
from star_jax.convert.infer import ModelOptions
from star_jax.convert.writers import WRITERS, LayoutName
from star_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convert:
    """Converts a published file of a model or a tokenizer to a model folder, or back.

    A file (.pth or .safetensors) becomes a folder for `sample --model` and `train --init`. A model
    folder becomes files with the published names of the tensors, in one of four layouts. Options
    from --size on describe what a file does not contain; their defaults are those of the published
    models.

    Example: star-jax convert star_d30_512.pth --tokenizer vae_ch160v4096z32.pth --size 512
    --text models/stable_diffusion_2_1/text_encoder --out models/star_d30_512

    Attributes:
        source: published file, or model folder.
        out: model folder to write, or the folder of the files.
        tokenizer: image tokenizer: its published file, or a model folder (training files of STAR
            contain one).
        text: text encoder: a folder, package:NAME, or a hub id.
        part: which weights of a file with several, such as model or ema ('': those of the
            exponential moving average).
        allow_nonfinite: convert weights that are NaN or infinite, too.
        copy_text: copy the text encoder into the model folder, instead of only naming it there.
        check: compare the weights of a model folder with the SHA-256 that it keeps.
        layout: files of a conversion back: flat (one safetensors file of the transformer and one
            of the tokenizer), sharded (safetensors of at most 5 GB with an index), pth (files of
            torch as the original code opens them to sample) or trainer (as Infinity's trainer
            opens them).
        model_options: fields of the configs that the file does not contain.
    """

    source: tyro.conf.Positional[Path]
    out: Path
    tokenizer: str = ''
    text: str = ''
    copy_text: bool = False
    check: bool = True
    part: str = ''
    allow_nonfinite: bool = False
    layout: LayoutName = 'flat'
    model_options: tyro.conf.OmitArgPrefixes[ModelOptions] = ModelOptions()


def main(words: Sequence[str]) -> int:
    options = arguments.parse(Convert, words, 'convert')
    console, start = Console(), time.monotonic()
    if options.source.is_dir():
        alone = Convert(
            source=options.source, out=options.out, check=options.check, layout=options.layout
        )
        if options != alone:
            raise UserError(
                'a model folder describes itself: give only --out, --layout and --no-check'
            )
        writer = WRITERS[options.layout]
        for path in transfer.to_files(options.source, options.out, writer, options.check):
            console.print(f'written: {path}', highlight=False, soft_wrap=True)
        return 0
    if options.layout != 'flat':
        raise UserError(
            f'--layout {options.layout} is for the conversion of a model folder, and '
            f'{options.source} is none: name a model folder, or leave --layout out'
        )
    if options.copy_text and not options.text:
        raise UserError('there is no text encoder to copy: name it with --text')
    files.check_folder(options.out)
    text = (
        transfer.TextSource(source=options.text, inside=options.copy_text) if options.text else None
    )
    parts, unused = transfer.to_folder(
        options.source,
        options.out,
        options=options.model_options,
        tokenizer=options.tokenizer,
        text=text,
        selection=transfer.Selection(
            part=options.part,
            allow_nonfinite=options.allow_nonfinite,
            check=options.check,
        ),
    )
    console.print(_summary(parts, unused))
    seconds = time.monotonic() - start
    console.print(f'model folder: {options.out} ({seconds:.1f} s)', highlight=False, soft_wrap=True)
    return 0


def _summary(parts: dict[str, transfer.ConvertedPart], unused: Sequence[str]) -> Table:
    rows = {}
    for name, part in parts.items():
        source = part.source
        if source.path:
            others = f' (also there: {", ".join(source.others)})' if source.others else ''
            rows |= {f'path of the {name}': f'{source.path}{others}'}
        if source.wrappers:
            rows |= {f'removed from names, {name}': ', '.join(source.wrappers)}
        if types := part.converted_types:
            rows |= {f'wider types, {name}': _listed(types)}
        rows |= {
            name: str(part.config),
            f'parameters of the {name}': f'{part.parameters:,}',
            f'recomputed, {name}': _listed(part.table.buffers),
            f'ignored, {name}': _listed(part.ignored),
        }
    if unused:
        rows |= {'not used': ', '.join(unused)}
    return pairs('contents of the file', rows)


def _listed(names: Sequence[str]) -> str:
    """Names without the numbers of layers, each with its count."""
    counts = collections.Counter(
        '.'.join('*' if word.isdigit() else word for word in name.split('.')) for name in names
    )
    return ', '.join(f'{name} ({count})' if count > 1 else name for name, count in counts.items())
