"""Which rule knows a recorded array?

A kind of case is a table of rules; a rule is a pattern of names, the array's class, and how the
array is computed from what the pattern's groups caught.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

from star_jax.errors import UserError
from star_jax.verify.cases import Case
from star_jax.verify.comparison import FAIL, INPUT, Line, compare, without_number


@dataclasses.dataclass(frozen=True)
class Rule:
    """Arrays whose whole name matches `pattern`, of class `measure`.

    `compute` takes the groups of the pattern as strings and gives the array in the recorded layout,
    or raises LookupError where the case has no such array. `unit` multiplies the tolerance.
    """

    pattern: str
    measure: str
    compute: Callable[..., Any] | None
    unit: float = 1.0


def given(pattern: str) -> Rule:
    """Inputs, compared with nothing."""
    return Rule(pattern, INPUT, None)


def judge(case: Case, rules: Sequence[Rule]) -> tuple[Line, ...]:
    """A line for every array that the case records."""
    return tuple(_judge(case, rules, name) for name in sorted(case.arrays, key=_numerically))


def _judge(case: Case, rules: Sequence[Rule], name: str) -> Line:
    matches = ((rule, re.fullmatch(rule.pattern, name)) for rule in rules)
    rule, match = next(((rule, match) for rule, match in matches if match), (None, None))
    if rule is None:
        return without_number(name, FAIL, 'no rule knows this array')
    if rule.compute is None:
        return without_number(name, INPUT)
    try:
        computed = rule.compute(*match.groups())
    except LookupError as error:
        return without_number(name, FAIL, f'the config describes no such array: {error}')
    try:
        return compare(name, computed, case.arrays[name], rule.measure, case.tolerances, rule.unit)
    except UserError as error:
        raise UserError(f'{case.folder}: {error}') from error


def _numerically(name: str) -> list[tuple[int, str]]:
    """fhat_9 before fhat_10."""
    parts = re.split(r'(\d+)', name)
    return [(int(part) if part.isdigit() else 0, part) for part in parts]
