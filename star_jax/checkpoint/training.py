"""How does a run survive being stopped at any moment?

Orbax writes the state of every so many steps to `folder/<step>`, in the background, under another
name until it is whole. Leaves are stored flat by name (`opt/0/mu/layers/kernel`), so that what is
missing or has changed can be said by name, and restored onto whatever shardings are asked for.
"""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

from star_jax.checkpoint import config, weights
from star_jax.errors import UserError

State = TypeVar('State')

ITEM = 'state'
MANIFEST = 'manifest.json'  # beside the item in a step: its files and their sizes in bytes
UNFINISHED = '.orbax-checkpoint-tmp'
TORN = 'torn-'  # a step set aside is renamed with this in front

_log = logging.getLogger(__name__)


def _is_worth_reading(record: logging.LogRecord) -> bool:
    """Whether a log record is more than Orbax telling of its work."""
    return record.levelno >= logging.ERROR or 'orbax' not in record.pathname


logging.getLogger('absl').addFilter(_is_worth_reading)


class TornError(Exception):
    """Why a step cannot be restored."""


class Checkpoints:
    """The newest `keep` states of one run in a folder.

    A folder that another process may be writing to is opened `read_only`: nothing in it is then
    saved, cleaned or set aside.
    """

    def __init__(self, folder: str | Path, keep: int = 2, *, read_only: bool = False) -> None:
        self._folder = Path(folder).absolute()
        self._read_only = read_only
        self._saving: int | None = None
        if not read_only:
            self._folder.mkdir(parents=True, exist_ok=True)
        for entry in sorted(self._folder.glob(f'*{UNFINISHED}*')):
            step = entry.name.partition(UNFINISHED)[0]
            _log.warning('%s: step %s was not finished when its run stopped', self._folder, step)
        self._manager = ocp.CheckpointManager(
            self._folder,
            item_handlers={ITEM: ocp.StandardCheckpointHandler()},
            options=self._options(keep),
        )

    def save(self, step: int, state: Any) -> None:
        """Starts saving a state and returns once it is safe to donate; a step is saved only once.

        Waits for the save before it, whose failure, if it failed, is raised here or by `wait`.
        """
        self.wait()
        if step in self._manager.all_steps():
            return
        self._saving = step
        item = ocp.args.StandardSave(_named(state))
        self._manager.save(step, args=ocp.args.Composite(**{ITEM: item}), force=True)

    def restore(self, like: State) -> tuple[int, State] | None:
        """The newest step that is whole and its state, or None if there is none.

        `like` is the state as arrays or abstract arrays; every leaf is restored bit for bit onto
        its sharding (onto one device where it has none). A torn step is set aside as `torn-<step>`
        with a warning. Raises UserError if a whole step holds another state than `like`.
        """
        self.wait()
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                return step, self._read(step, like)
            except TornError as flaw:
                _log.warning('%s: step %d is torn and skipped: %s', self._folder, step, flaw)
                self._set_aside(step)
        return None

    def latest(self) -> int | None:
        """The newest step, or None; one that is being saved counts."""
        return self._manager.latest_step()

    def wait(self) -> None:
        """Returns when what `save` started is on disk; raises what went wrong in the background."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then stops the threads behind this object."""
        self._manager.close()

    def _options(self, keep: int) -> ocp.CheckpointManagerOptions:
        if self._read_only:
            return ocp.CheckpointManagerOptions(read_only=True, create=False, save_interval_steps=0)
        return ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.LatestN(keep),
            cleanup_tmp_directories=True,
            async_options=ocp.options.AsyncOptions(post_finalization_callback=self._write_manifest),
        )

    def _write_manifest(self) -> None:
        """Lists the files of a step before it gets its name; Orbax calls this in its thread."""
        if jax.process_index() != 0:
            return
        unfinished = self._folder / f'{self._saving}{UNFINISHED}'
        step = unfinished if unfinished.exists() else self._folder / str(self._saving)
        config.write_json(step / MANIFEST, _file_sizes(step / ITEM))

    def _read(self, step: int, like: State) -> State:
        """The state of one step; TornError if it is damaged, UserError if it is another state."""
        _check_whole(self._folder / str(step))
        wanted = {name: _abstract(leaf) for name, leaf in _named(like).items()}
        try:
            saved = self._manager.item_metadata(step)[ITEM].tree
        except Exception as error:
            raise TornError(f'its metadata cannot be read ({error})') from error
        if flaws := weights.mismatches(saved, wanted, _is_same_form):
            raise UserError(f'{self._folder}, step {step}: holds another state: {flaws}')
        args = ocp.args.Composite(**{ITEM: ocp.args.StandardRestore(wanted)})
        try:
            restored = self._manager.restore(step, args=args)[ITEM]
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise  # no fault of the step's
        except Exception as error:
            if jax.process_count() > 1:
                raise  # the other processes may have read it well, and would part from this one
            raise TornError(str(error).partition('\n')[0]) from error
        leaves = [restored[name] for name in wanted]
        return jax.tree.unflatten(jax.tree.structure(like), leaves)

    def _set_aside(self, step: int) -> None:
        if self._read_only:
            return
        if jax.process_index() == 0:
            aside = self._folder / f'{TORN}{step}'
            while aside.exists():
                aside = aside.with_name(f'{aside.name}-again')
            os.rename(self._folder / str(step), aside)
        self._manager.reload()


def _named(tree: Any) -> dict[str, Any]:
    """The leaves of any tree by '/'-joined path, in the tree's order."""
    leaves = jax.tree.leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator='/'): leaf for path, leaf in leaves}
    if len(named) != len(leaves):
        raise ValueError("two leaves of the state have the same '/'-joined name")
    return named


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    where = getattr(leaf, 'sharding', None)
    where = where or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)


def _is_same_form(saved: Any, wanted: Any) -> bool:
    return (tuple(saved.shape), saved.dtype) == (tuple(wanted.shape), wanted.dtype)


def _file_sizes(folder: Path) -> dict[str, int]:
    files = (entry for entry in sorted(folder.rglob('*')) if entry.is_file())
    return {entry.relative_to(folder).as_posix(): entry.stat().st_size for entry in files}


def _check_whole(step: Path) -> None:
    """Raises TornError unless every file of the step's manifest is there with its size."""
    try:
        manifest: Mapping[str, int] = config.read_json(step / MANIFEST)
    except UserError as error:
        raise TornError(f'its list of files is missing or damaged ({error})') from error
    found = _file_sizes(step / ITEM)
    for name, size in manifest.items():
        if name not in found:
            raise TornError(f'{ITEM}/{name} is missing')
        if found[name] != size:
            raise TornError(f'{ITEM}/{name} has {found[name]} bytes, expected {size}')
