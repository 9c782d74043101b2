"""As which files does a conversion back write a state dict?"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from star_jax.checkpoint import stored, weights
from star_jax.convert import torch_files
from star_jax.convert.layouts import Layout
from star_jax.errors import UserError

FLAT = 'state_dict.safetensors'  # ending of the files of `FlatWriter`


class Writer(Protocol):
    """Writes the state dict of a transformer or a tokenizer."""

    def check(self, layout: Layout) -> None:
        """Raises UserError if it cannot write a state dict of this layout."""

    def write(self, folder: Path, part: str, state: Mapping[str, Any], layout: Layout) -> Path:
        """Writes the files, and returns the one to read: of several, their index.

        Args:
            folder: the folder of the files.
            part: 'transformer' or 'tokenizer', with which their names begin.
            state: arrays, or `stored.StreamedArray`s of which one part at a time is in memory, by
                published name.
            layout: the layout of the published file.

        Raises:
            UserError: the library of the format refuses to write.
            OSError: a file cannot be written.
        """


class FlatWriter:
    """One safetensors file (a `Writer`)."""

    def check(self, layout: Layout) -> None:
        pass

    def write(self, folder: Path, part: str, state: Mapping[str, Any], layout: Layout) -> Path:
        path = folder / f'{part}.{FLAT}'
        stored.write(path, state)
        return path


class ShardsWriter:
    """Safetensors files of at most 5 GB (or one array), with an index (a `Writer`)."""

    def check(self, layout: Layout) -> None:
        pass

    def write(self, folder: Path, part: str, state: Mapping[str, Any], layout: Layout) -> Path:
        path = folder / f'{part}.safetensors'
        weights.save_shards(path, state, weights.SHARD_BYTES)
        return weights.index_path(path)


class SamplerWriter:
    """A file of torch with the dicts that the original code opens to sample (a `Writer`)."""

    def check(self, layout: Layout) -> None:
        torch_files.check_available()

    def write(self, folder: Path, part: str, state: Mapping[str, Any], layout: Layout) -> Path:
        path = folder / f'{part}.pth'
        torch_files.save(path, state, layout.place)
        return path


class TrainerWriter:
    """A file of torch with the dicts that the original trainer opens (a `Writer`)."""

    def check(self, layout: Layout) -> None:
        if layout.trainer_place is None:
            raise UserError(
                'only Infinity has files of a trainer in another layout than those for sampling: '
                'choose --layout pth'
            )
        torch_files.check_available()

    def write(self, folder: Path, part: str, state: Mapping[str, Any], layout: Layout) -> Path:
        path = folder / f'{part}.trainer.pth'
        torch_files.save(path, state, layout.trainer_place)
        return path


WRITERS: Mapping[str, Writer] = {
    'flat': FlatWriter(),
    'sharded': ShardsWriter(),
    'pth': SamplerWriter(),
    'trainer': TrainerWriter(),
}
