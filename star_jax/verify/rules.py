"""Which rule computes a recorded array?

A kind of case is a table of rules. A rule is a pattern of names, a tolerance class, and a function
that computes the array from the groups of the pattern.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

from star_jax.errors import UserError
from star_jax.verify.cases import Case
from star_jax.verify.comparison import FAIL, INPUT, Line, compare, uncompared


@dataclasses.dataclass(frozen=True)
class Rule:
    """How the arrays of some names are computed.

    Attributes:
        pattern: a regular expression that matches the whole name.
        tolerance_class: the class of the arrays (`comparison`), INPUT or INFORMATION.
        compute: takes the groups of the pattern as strings and returns the array in the recorded
            layout; raises LookupError where the config describes no such array. None for inputs.
        unit: factor of the tolerance.
    """

    pattern: str
    tolerance_class: str
    compute: Callable[..., Any] | None
    unit: float = 1.0


def inputs(pattern: str) -> Rule:
    """The rule of recorded inputs, which are not compared."""
    return Rule(pattern, INPUT, None)


def compare_case(case: Case, rules: Sequence[Rule]) -> tuple[Line, ...]:
    """A line for every array of the case; the first rule that matches a name counts."""
    names = sorted(case.arrays, key=_numerically)
    return tuple(_compare_array(case, rules, name) for name in names)


def _compare_array(case: Case, rules: Sequence[Rule], name: str) -> Line:
    matches = ((rule, re.fullmatch(rule.pattern, name)) for rule in rules)
    rule, match = next(((rule, match) for rule, match in matches if match), (None, None))
    if rule is None:
        return uncompared(name, FAIL, 'no rule computes this array')
    if rule.compute is None:
        return uncompared(name, INPUT)
    try:
        computed = rule.compute(*match.groups())
    except LookupError as error:
        return uncompared(name, FAIL, f'the config describes no such array: {error}')
    try:
        return compare(
            name,
            computed=computed,
            recorded=case.arrays[name],
            tolerance_class=rule.tolerance_class,
            tolerances=case.tolerances,
            unit=rule.unit,
        )
    except UserError as error:
        raise UserError(f'{case.folder}: {error}') from error


def _numerically(name: str) -> list[tuple[int, str]]:
    """A sort key that puts fhat_9 before fhat_10."""
    parts = re.split(r'(\d+)', name)
    return [(int(part) if part.isdigit() else 0, part) for part in parts]
