"""As which files does a conversion back write a state dict?"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class TorchWriter:
    """A file of torch with dicts around the state dict (a `Writer`).

    Attributes:
        ending: ending of its name.
        place: the keys of the dicts for a layout, the outermost first; None: there is no such file.
    """

    ending: str
    place: Callable[[Layout], tuple[str, ...] | None]

    def check(self, layout: Layout) -> None:
        if self.place(layout) is None:
            raise UserError(
                f'no original code opens a file *.{self.ending} of this model: choose --layout pth'
            )
        torch_files.check_available()

    def write(self, folder: Path, part: str, state: Mapping[str, Any], layout: Layout) -> Path:
        path = folder / f'{part}.{self.ending}'
        torch_files.save(path, state, self.place(layout))
        return path


LayoutName = Literal['flat', 'sharded', 'pth', 'trainer']
WRITERS: Mapping[LayoutName, Writer] = {
    'flat': FlatWriter(),
    'sharded': ShardsWriter(),
    'pth': TorchWriter(ending='pth', place=lambda layout: layout.place),
    'trainer': TorchWriter(ending='trainer.pth', place=lambda layout: layout.trainer_place),
}
