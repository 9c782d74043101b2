"""What is told of a run while it goes?

Means of the scalars, to `metrics.jsonl` and as TensorBoard's event files, and pictures. Whatever
stops a run, these files are then as they would be had it not been stopped.
"""

import contextlib
import json
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from tensorboardX import summary
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import RecordWriter

from star_jax import files, image_io
from star_jax.training.faults import first_flaw

SAMPLES = 'samples'
METRICS = 'metrics.jsonl'
AHEAD = 2  # steps: enough to keep a device busy, and a run stops soon

Scalars = Mapping[str, jax.Array | np.ndarray]


class MetricsWindow:
    """The scalars of every step since the last report at `step`: their means, and the speed.

    A run that was stopped between two reports goes on with what was `pending`.
    """

    def __init__(
        self, batch: int, step: int, pending: Sequence[Mapping[str, float]] | None = None
    ) -> None:
        self._batch = batch
        self._metrics: list[Scalars] = [_rounded(scalars) for scalars in pending or ()]
        self._reported = step - len(self._metrics)
        self.restart()

    def restart(self) -> None:
        """Starts the clock anew; what was not training does not count."""
        self._begin = time.perf_counter()
        self._counted = len(self._metrics)

    def add(self, metrics: Scalars) -> None:
        """One step's scalars, not yet fetched. Waits until at most `AHEAD` steps are under way."""
        self._metrics.append(metrics)
        jax.block_until_ready(self._metrics[-1 - AHEAD : -AHEAD])

    def flaw(self) -> str | None:
        """The first step whose scalars are not all finite, as 'step 7: loss is nan', or None."""
        flaw = first_flaw(self._fetch())
        return flaw and f'step {self._reported + 1 + flaw[0]}: {flaw[1]}'

    def pending(self) -> list[dict[str, float]]:
        """The scalars of each step, exactly, for JSON."""
        return [{name: float(value) for name, value in m.items()} for m in self._fetch()]

    def close(self) -> dict[str, float]:
        """The means; the next window begins."""
        fetched = self._fetch()
        seconds = time.perf_counter() - self._begin
        steps = len(fetched) - self._counted
        means = {name: float(np.mean([m[name] for m in fetched])) for name in fetched[0]}
        self._reported += len(fetched)
        self._metrics = []
        self.restart()
        return means | {'images_per_second': steps * self._batch / seconds}

    def _fetch(self) -> list[Scalars]:
        """Waits for the last step."""
        self._metrics = [_rounded(scalars) for scalars in jax.device_get(self._metrics)]
        return self._metrics


def begin(out: Path, step: int) -> 'RunLogger | NullLogger':
    """The report of this process on a run in the folder `out` that goes on after `step`."""
    return RunLogger(out, step) if jax.process_index() == 0 else NullLogger()


class NullLogger:
    """What all processes of a run but the first tell: they would write the same files."""

    def __enter__(self) -> 'NullLogger':
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        pass

    def picture(self, step: int, picture_hwc: np.ndarray) -> None:
        pass


class RunLogger:
    """Scalars to `metrics.jsonl` and TensorBoard, pictures to `samples/` and TensorBoard.

    What an interrupted run reported after `step` is dropped: the run reports it again.
    """

    def __init__(self, out: Path, step: int) -> None:
        self._path = out / METRICS
        self._samples = out / SAMPLES
        self._samples.mkdir(exist_ok=True)
        files.remove_temporary_files(out, METRICS)
        files.remove_temporary_files(self._samples, '*.png')
        lines = self._path.read_text(errors='replace') if self._path.exists() else ''
        kept = [line for line in lines.splitlines() if _step_of(line) <= step]
        with files.replacing(self._path) as draft:
            draft.write_text(''.join(f'{line}\n' for line in kept))
        self._events = Events(out, step)

    def __enter__(self) -> 'RunLogger':
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        with contextlib.suppress(*[OSError] if kind else []):
            self._events.close()

    def scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        with self._path.open('a') as file:
            file.write(json.dumps({'step': step, **scalars}) + '\n')
        for name, value in scalars.items():
            self._events.add(step, summary.scalar(name, value))
        self._events.flush()

    def picture(self, step: int, picture_hwc: np.ndarray) -> None:
        with files.replacing(self._samples / f'{step:08d}.png') as draft:
            draft.write_bytes(image_io.encode(picture_hwc))
        self._events.add(step, summary.image('samples', picture_hwc, dataformats='HWC'))
        self._events.flush()


class Events:
    """TensorBoard's event file of a run that goes on after `step`.

    Written at once and by the caller: the library's writer has a thread, which a full disk ends,
    and the caller then waits for it for ever.
    """

    def __init__(self, out: Path, step: int) -> None:
        name = f'events.out.tfevents.{time.time_ns() // 10**9}.{socket.gethostname()}'
        self._records = RecordWriter(str(out / name))
        self._write(Event(file_version='brain.Event:2'))
        self._write(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def add(self, step: int, content: summary.Summary) -> None:
        self._write(Event(step=step, summary=content))

    def flush(self) -> None:
        self._records.flush()

    def close(self) -> None:
        self._records.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())


def _rounded(scalars: Scalars | Mapping[str, float]) -> Scalars:
    return {name: np.float32(value) for name, value in scalars.items()}


def _step_of(line: str) -> float:
    """The step of a line of metrics; a torn line counts as never reported."""
    try:
        return json.loads(line)['step']
    except (json.JSONDecodeError, KeyError, TypeError):
        return float('inf')
