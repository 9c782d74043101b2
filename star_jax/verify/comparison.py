"""How far is a computed array from a recorded one, and is that within the tolerance?

Each array belongs to a tolerance class. The case, or a table of its family, gives the tolerance of
the class, and the class has a factor.
"""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from star_jax.console import Console
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
TOKENIZED = 'tokenizer_outputs'
ACTIVATIONS = 'activations_relative_to_max'
GENERATED = 'generated_logits_relative_to_max'
FLOORED_GRADIENTS = 'gradients_relative_to_max_with_floor'
BYTES = 'bytes_of_images'
GUIDED_LOGITS = 'logits_after_guidance'
HIDDEN = 'hidden_states'
OBJECTIVES = 'losses'
QUANTISER_GRADIENTS = 'quantiser_gradients_relative_to_max'
FUNCTIONS = 'functions_without_weights'

FLOOR = 5e-3  # floor of FLOORED_GRADIENTS, in units of the tolerance: 1e-6 where that is 2e-4

# Factors of the tolerances, as functions of the recorded array; 1 for the other classes.
FACTORS: Mapping[str, Callable[[np.ndarray], np.ndarray | float]] = {
    LATENTS: lambda recorded: max(1.0, _largest(recorded)),
    GRADIENTS: lambda recorded: _largest(recorded),
    ACTIVATIONS: lambda recorded: _largest(recorded),
    GENERATED: lambda recorded: _largest(recorded),
    FLOORED_GRADIENTS: lambda recorded: _largest(recorded) + FLOOR,
    QUANTISER_GRADIENTS: lambda recorded: _largest(recorded),
    LOSSES: np.abs,
    NORMS: np.abs,
}

OK, FAIL, SKIPPED, INPUT, INFORMATION = 'ok', 'FAIL', 'SKIPPED', 'input', 'information'


@dataclasses.dataclass(frozen=True)
class Line:
    """The result of one array.

    Attributes:
        name: name of the array.
        error: absolute error of the element whose error is largest relative to its tolerance.
        tolerance: absolute tolerance of that element; both are NaN if nothing was compared.
        verdict: OK, FAIL, SKIPPED, INPUT or INFORMATION.
        note: the reason of the verdict, may be empty.
    """

    name: str
    error: float
    tolerance: float
    verdict: str
    note: str = ''


@dataclasses.dataclass(frozen=True)
class CaseReport:
    """The result of one case.

    Attributes:
        case: name of its folder.
        lines: one per recorded array.
    """

    case: str
    lines: tuple[Line, ...]

    @property
    def failed(self) -> bool:
        return any(line.verdict == FAIL for line in self.lines)

    def count(self, verdict: str) -> int:
        return sum(line.verdict == verdict for line in self.lines)


def uncompared(name: str, verdict: str, note: str = '') -> Line:
    """The line of an array without numbers."""
    return Line(name, np.nan, np.nan, verdict, note)


def compare(
    name: str,
    *,
    computed: np.ndarray,
    recorded: np.ndarray,
    tolerance_class: str,
    tolerances: Mapping[str, float | str],
    unit: float = 1.0,
) -> Line:
    """Compares one array; integers must be equal, except for the BYTES of images.

    Args:
        name: name of the array.
        computed: our array.
        recorded: the array of the case.
        tolerance_class: its class, or INFORMATION: the error is reported and never fails.
        tolerances: the tolerance of each class.
        unit: factor of the tolerance, such as the peak of a learning rate.
    """
    computed, recorded = np.asarray(computed), np.asarray(recorded)
    if computed.shape != recorded.shape:
        return uncompared(name, FAIL, f'shape {computed.shape}, recorded {recorded.shape}')
    exact = tolerance_class == INTEGERS or (
        recorded.dtype.kind in 'iub' and tolerance_class != BYTES
    )
    computed, recorded = computed.astype(np.float64), recorded.astype(np.float64)
    if tolerance_class == INFORMATION:
        return Line(name, _largest(computed - recorded), np.inf, INFORMATION)
    tolerance = 0.0 if exact else _tolerance(tolerances, tolerance_class) * unit
    factor = 1.0 if exact else FACTORS.get(tolerance_class, np.ones_like)(recorded)
    errors = np.zeros_like(recorded)  # also where both are infinite
    np.subtract(computed, recorded, out=errors, where=computed != recorded)
    errors = np.abs(errors).ravel()
    allowed = np.broadcast_to(tolerance * factor, recorded.shape).ravel()
    if not errors.size:
        return Line(name, 0.0, tolerance, OK)
    worst = np.argmax(errors / np.maximum(allowed, 1e-30))  # NaN counts as the largest
    passes = bool(np.all(errors <= allowed))
    return Line(name, errors[worst], allowed[worst], OK if passes else FAIL)


def write(report: CaseReport, seconds: float, console: Console) -> None:
    """Prints one line per array and a summary."""
    width = max([len(line.name) for line in report.lines], default=0)
    for line in report.lines:
        numbers = ' ' * 19
        if not np.isnan(line.tolerance):
            numbers = f'{line.error:9.2e} {line.tolerance:9.2e}'
        verdict = f'{line.verdict} ({line.note})' if line.note else line.verdict
        _print(console, f'{line.name:<{width}}  {numbers}  {verdict}', line.verdict == FAIL)
    shown = (OK, INPUT, SKIPPED, *([INFORMATION] if report.count(INFORMATION) else []))
    counts = ', '.join(f'{report.count(verdict)} {verdict}' for verdict in shown)
    verdict = f'{report.count(FAIL)} FAIL' if report.failed else 'passes'
    _print(console, f'{report.case}: {verdict} ({counts}; {seconds:.1f} s)\n', report.failed)


def _largest(array: np.ndarray) -> float:
    return np.abs(array).max(initial=0)


def _tolerance(tolerances: Mapping[str, float | str], tolerance_class: str) -> float:
    value = tolerances.get(tolerance_class)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(
            f'the tolerances of a case must hold a number for {tolerance_class}, not {value!r}'
        )
    return float(value)


def _print(console: Console, text: str, failed: bool) -> None:
    style = 'red' if failed else None
    console.print(text, style=style, highlight=False, soft_wrap=True)
