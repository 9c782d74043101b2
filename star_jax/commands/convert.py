"""`star-jax convert FILE|FOLDER --out PLACE`"""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from star_jax import files
from star_jax.commands import arguments
from star_jax.convert import transfer
from star_jax.convert.infer import Unsaid
from star_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convert:
    """Makes a model folder of a published STAR, VAR or tokenizer file, and the other way round.

    FILE (.pth, or .safetensors) becomes a folder for `sample --model` and `train --init`. A model
    FOLDER becomes two files of tensors in the originals' names.

    Example: star-jax convert star_d30_512.pth --tokenizer vae_ch160v4096z32.pth --size 512
    --text models/stable_diffusion_2_1/text_encoder --out models/star_d30_512

    Attributes:
        source: the file or the folder.
        out: the model folder, or the folder for the two files.
        tokenizer: the image tokenizer: its published file, or a model folder (a STAR trainer's file
            has its own).
        text: the text encoder: a folder, package:NAME, or a hub id.
        text_inside: copy the text encoder into the model folder, instead of naming its place.
        unsaid: what the file does not say.
    """

    source: tyro.conf.Positional[Path]
    out: Path
    tokenizer: str = ''
    text: str = ''
    text_inside: bool = False
    unsaid: tyro.conf.OmitArgPrefixes[Unsaid] = Unsaid()


def main(words: Sequence[str]) -> int:
    given = arguments.parse(Convert, words, 'convert')
    console, start = Console(), time.monotonic()
    if given.source.is_dir():
        if given.tokenizer or given.text or given.text_inside or given.unsaid != Unsaid():
            raise UserError('a model folder says all about itself: give --out alone')
        for path in transfer.to_files(given.source, given.out):
            console.print(f'written: {path}', highlight=False, soft_wrap=True)
        return 0
    if given.text_inside and not given.text:
        raise UserError('there is no text encoder to copy: name it with --text')
    files.check_folder(given.out)
    text = transfer.Text(source=given.text, inside=given.text_inside) if given.text else None
    parts = transfer.to_folder(given.source, given.out, given.unsaid, given.tokenizer, text)
    console.print(_summary(parts))
    seconds = time.monotonic() - start
    console.print(f'model folder: {given.out} ({seconds:.1f} s)', highlight=False, soft_wrap=True)
    return 0


def _summary(parts: dict[str, transfer.Part]) -> Table:
    table = Table(show_header=False, title='what the file is')
    for name, part in parts.items():
        table.add_row(name, str(part.config))
        table.add_row('parameters', f'{part.parameters:,}')
        table.add_row('made again from the sizes', _listed(part.table.made))
        table.add_row('ignored', _listed(part.ignored))
    return table


def _listed(names: Sequence[str]) -> str:
    """Names without the numbers of layers, each with how often it is there."""
    kinds: dict[str, int] = {}
    for name in names:
        kind = '.'.join('*' if word.isdigit() else word for word in name.split('.'))
        kinds[kind] = kinds.get(kind, 0) + 1
    return ', '.join(f'{kind} ({count})' if count > 1 else kind for kind, count in kinds.items())
