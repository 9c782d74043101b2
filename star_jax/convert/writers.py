"""As which files does a conversion back write a state dict?"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from star_jax.checkpoint import stored, weights
from star_jax.convert import torch_files
from star_jax.convert.layouts import Layout

SHARD_BYTES = 5 * 10**9  # largest file of `sharded`, as in Hugging Face folders
FLAT = 'state_dict.safetensors'  # ending of the files of `flat`
PARTS = ('transformer', 'tokenizer')

Writer = Callable[[Path, str, Mapping[str, Any], Layout], Path]


def flat(folder: Path, part: str, state: Mapping[str, Any], layout: Layout) -> Path:
    """Writes one safetensors file.

    Args:
        folder: the folder of the file.
        part: one of `PARTS`.
        state: arrays, or `stored.StreamedArray`s of which one part at a time is in memory, by
            published name.
        layout: the layout of the published file.

    Returns:
        The file to read: an index, where there are several.

    Raises:
        UserError: a library that the file needs is missing.
        OSError: the file cannot be written.
    """
    path = folder / f'{part}.{FLAT}'
    stored.write(path, state)
    return path


def sharded(folder: Path, part: str, state: Mapping[str, Any], layout: Layout) -> Path:
    """As `flat`, several safetensors files of at most 5 GB with an index."""
    path = folder / f'{part}.safetensors'
    weights.save_shards(path, state, SHARD_BYTES)
    return weights.index_path(path)


def pth(folder: Path, part: str, state: Mapping[str, Any], layout: Layout) -> Path:
    """As `flat`, a file of torch with the dicts that the original code opens to sample."""
    return _write_torch(folder / f'{part}.pth', state, layout.place)


def trainer(folder: Path, part: str, state: Mapping[str, Any], layout: Layout) -> Path:
    """As `flat`, a file of torch with the dicts that the original trainer opens."""
    return _write_torch(folder / f'{part}.pth', state, layout.trainer_place or layout.place)


WRITERS: Mapping[str, Writer] = {
    'flat': flat,
    'sharded': sharded,
    'pth': pth,
    'trainer': trainer,
}


def _write_torch(path: Path, state: Mapping[str, Any], place: tuple[str, ...]) -> Path:
    torch_files.check_available()
    # Tensors of a file are mapped into memory: a model larger than memory can be written, too.
    mapped = path.with_name(f'.{path.name}.safetensors')
    try:
        stored.write(mapped, state)
        torch_files.save(path, mapped, place)
    finally:
        mapped.unlink(missing_ok=True)
    return path
