"""How far is a computed array from a recorded one, and is that close enough?

The classes of arrays and their tolerances are those of docs/recorded_cases.md: a tolerance comes
from the case, and a class says what it is multiplied by.
"""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
from rich.console import Console

from star_jax.errors import UserError

INTEGERS = 'integers'
LOGITS = 'logits'
LATENTS = 'latents_and_images_times_max1'
TABLES = 'tables'
LOSSES = 'losses_relative'
NORMS = 'gradient_norms_relative'
GRADIENTS = 'gradients_relative_to_max'
PARAMETERS = 'trained_parameters'
SCHEDULES = 'schedules_relative_to_peak'

# What the case's mark of a class is multiplied by, given the recorded array; 1 for all others.
SCALES: Mapping[str, Callable[[np.ndarray], np.ndarray | float]] = {
    LATENTS: lambda recorded: max(1.0, np.abs(recorded).max(initial=0)),
    GRADIENTS: lambda recorded: np.abs(recorded).max(initial=0),
    LOSSES: np.abs,
    NORMS: np.abs,
}

OK, FAIL, SKIPPED, INPUT = 'ok', 'FAIL', 'SKIPPED', 'input'


@dataclasses.dataclass(frozen=True)
class Line:
    """One array: its largest error beside what is allowed there, a verdict, and perhaps why."""

    name: str
    error: float
    tolerance: float
    verdict: str
    note: str = ''


@dataclasses.dataclass(frozen=True)
class Report:
    """One case: a line per recorded array."""

    case: str
    lines: tuple[Line, ...]

    @property
    def failed(self) -> bool:
        return any(line.verdict == FAIL for line in self.lines)

    def count(self, verdict: str) -> int:
        return sum(line.verdict == verdict for line in self.lines)


def without_number(name: str, verdict: str, note: str = '') -> Line:
    """The line of an array that was compared with nothing."""
    return Line(name, np.nan, np.nan, verdict, note)


def compare(
    name: str,
    computed: np.ndarray,
    recorded: np.ndarray,
    measure: str,
    tolerances: Mapping[str, float | str],
    unit: float = 1.0,
) -> Line:
    """The line of a compared array: the place where the error is largest for what is allowed there.

    `measure` is the array's class; integers must be equal whatever it says. `unit` multiplies the
    tolerance (the peak of a learning rate).
    """
    computed, recorded = np.asarray(computed), np.asarray(recorded)
    if computed.shape != recorded.shape:
        return without_number(name, FAIL, f'shape {computed.shape}, recorded {recorded.shape}')
    exact = measure == INTEGERS or recorded.dtype.kind in 'iub'
    computed, recorded = computed.astype(np.float64), recorded.astype(np.float64)
    mark = 0.0 if exact else _mark(tolerances, measure) * unit
    scale = 1.0 if exact else SCALES.get(measure, np.ones_like)(recorded)
    errors = np.abs(computed - recorded).ravel()
    allowed = np.broadcast_to(mark * scale, recorded.shape).ravel()
    if not errors.size:
        return Line(name, 0.0, mark, OK)
    worst = np.argmax(errors / np.maximum(allowed, 1e-30))  # NaN is the largest
    good = bool(np.all(errors <= allowed))
    return Line(name, errors[worst], allowed[worst], OK if good else FAIL)


def write(report: Report, seconds: float, console: Console) -> None:
    """Prints one line per array and a summary."""
    width = max([len(line.name) for line in report.lines], default=0)
    for line in report.lines:
        numbers = ' ' * 19
        if not np.isnan(line.tolerance):
            numbers = f'{line.error:9.2e} {line.tolerance:9.2e}'
        verdict = f'{line.verdict} ({line.note})' if line.note else line.verdict
        _print(console, f'{line.name:<{width}}  {numbers}  {verdict}', line.verdict == FAIL)
    counts = ', '.join(f'{report.count(verdict)} {verdict}' for verdict in (OK, INPUT, SKIPPED))
    verdict = f'{report.count(FAIL)} FAIL' if report.failed else 'passes'
    _print(console, f'{report.case}: {verdict} ({counts}; {seconds:.1f} s)\n', report.failed)


def _mark(tolerances: Mapping[str, float | str], measure: str) -> float:
    mark = tolerances.get(measure)
    if isinstance(mark, bool) or not isinstance(mark, int | float):
        raise UserError(f'the tolerances of a case must hold a number for {measure}, not {mark!r}')
    return float(mark)


def _print(console: Console, text: str, alarming: bool) -> None:
    style = 'red' if alarming else None
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
