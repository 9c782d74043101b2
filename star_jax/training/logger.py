"""What is recorded of a run while it trains?

Mean metrics, in `metrics.jsonl` and as TensorBoard's event files, and sample grids. Whatever stops
a run, these files are afterwards as if it had not been stopped.
"""

import contextlib
import json
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import jax
import numpy as np
from tensorboardX import summary
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import RecordWriter

from star_jax import files, image_io
from star_jax.training.finite import first_flaw

SAMPLES = 'samples'
METRICS = 'metrics.jsonl'
HELD_OUT = 'validation/'  # names of metrics of the validation set begin so
STEPS_AHEAD = 2  # dispatched steps: enough to keep a device busy, and a run stops soon

Metrics = Mapping[str, jax.Array | np.ndarray]


class MetricsWindow:
    """The metrics of every step since the last report: their means, and the speed.

    Args:
        batch: images of a step, on average.
        step: the step after which the window starts.
        pending: the metrics of the steps before it that were not reported yet, as an interrupted
            run has saved them.
    """

    def __init__(
        self, batch: float, step: int, pending: Sequence[Mapping[str, float]] | None = None
    ) -> None:
        self._batch = batch
        self._metrics: list[Metrics] = [_to_float32(metrics) for metrics in pending or ()]
        self._reported = step - len(self._metrics)
        self.restart_clock()

    def restart_clock(self) -> None:
        """Measures the speed from now on: evaluation and saving do not count."""
        self._start_time = time.perf_counter()
        self._counted = len(self._metrics)

    def add(self, metrics: Metrics) -> None:
        """Adds the metrics of a step, not yet fetched; waits for all but `STEPS_AHEAD` steps."""
        self._metrics.append(metrics)
        jax.block_until_ready(self._metrics[-1 - STEPS_AHEAD : -STEPS_AHEAD])

    def flaw(self) -> str | None:
        """The first step with a non-finite metric, as 'step 7: loss is nan', or None."""
        flaw = first_flaw(self._fetch())
        return flaw and f'step {self._reported + 1 + flaw[0]}: {flaw[1]}'

    def pending(self) -> list[dict[str, float]]:
        """The metrics of each step, exactly, for JSON."""
        return [{name: float(value) for name, value in m.items()} for m in self._fetch()]

    def close(self) -> dict[str, float]:
        """The mean metrics and images per second; starts the next window."""
        fetched = self._fetch()
        seconds = time.perf_counter() - self._start_time
        steps = len(fetched) - self._counted
        means = {name: float(np.mean([m[name] for m in fetched])) for name in fetched[0]}
        self._reported += len(fetched)
        self._metrics = []
        self.restart_clock()
        return means | {'images_per_second': steps * self._batch / seconds}

    def _fetch(self) -> list[Metrics]:
        """The metrics on the host, after the last step."""
        self._metrics = [_to_float32(metrics) for metrics in jax.device_get(self._metrics)]
        return self._metrics


class Logger(Protocol):
    """Records metrics and images of a run, by the number of completed steps."""

    def __enter__(self) -> 'Logger': ...

    def __exit__(self, *_: object) -> None: ...

    def is_evaluated(self, step: int) -> bool: ...

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def log_image(self, step: int, image_hwc: np.ndarray) -> None: ...


def open_logger(out: Path, step: int) -> Logger:
    """The logger of this process, for a run in the folder `out` that continues after `step`.

    All processes compute the same metrics; the first one records them.
    """
    return RunLogger(out, step) if jax.process_index() == 0 else NullLogger()


class NullLogger:
    """Records nothing."""

    def __enter__(self) -> 'NullLogger':
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def is_evaluated(self, step: int) -> bool:
        return False

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        pass

    def log_image(self, step: int, image_hwc: np.ndarray) -> None:
        pass


class RunLogger:
    """Writes metrics to `metrics.jsonl` and TensorBoard, images to `samples/` and TensorBoard.

    Lines that an interrupted run wrote after `step` are dropped: the run writes them again.
    """

    def __init__(self, out: Path, step: int) -> None:
        self._path = out / METRICS
        self._samples = out / SAMPLES
        self._samples.mkdir(exist_ok=True)
        files.remove_temporary_files(out, METRICS)
        files.remove_temporary_files(self._samples, '*.png')
        files.check_regular(self._path)
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

    def is_evaluated(self, step: int) -> bool:
        """Whether metrics of the validation set after `step` steps are recorded."""
        lines = map(json.loads, self._path.read_text().splitlines())
        return any(
            line['step'] == step and any(name.startswith(HELD_OUT) for name in line)
            for line in lines
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        with self._path.open('a') as file:
            file.write(json.dumps({'step': step, **metrics}) + '\n')
        for name, value in metrics.items():
            self._events.add(step, summary.scalar(name, value))
        self._events.flush()

    def log_image(self, step: int, image_hwc: np.ndarray) -> None:
        with files.replacing(self._samples / f'{step:08d}.png') as draft:
            draft.write_bytes(image_io.encode(image_hwc))
        self._events.add(step, summary.image('samples', image_hwc, dataformats='HWC'))
        self._events.flush()


class Events:
    """TensorBoard's event file of a run that continues after `step`.

    The caller's thread writes it at once. The library's own writer has a thread, which a full disk
    ends, and the caller then waits for that thread forever.
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


def _to_float32(metrics: Metrics | Mapping[str, float]) -> Metrics:
    return {name: np.float32(value) for name, value in metrics.items()}


def _step_of(line: str) -> float:
    """The step of a line of metrics; infinity for a torn line, as if it was never written."""
    try:
        return float(files.parse_json(line)['step'])
    except (ValueError, KeyError, TypeError, OverflowError):
        return float('inf')
