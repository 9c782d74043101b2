"""Which tables and verdicts follow from the results of the study of positions?

The primary comparisons are fixed before the first unit (docs/positions.md), and only they get a
verdict; their error rate is controlled together. Everything else is described. The same files give
the same bytes.
"""

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from star_jax import files
from star_jax.checkpoint import config
from star_jax.console import Console
from star_jax.errors import UserError
from star_jax.studies import provenance, report_files, units
from star_jax.studies.arms import KINDS
from star_jax.studies.cells import Cells
from star_jax.studies.cost_result import CostResult
from star_jax.studies.curves import plot
from star_jax.studies.positions_result import PositionsResult
from star_jax.studies.reference import KIND as REFERENCE
from star_jax.studies.reference import ReferenceResult
from star_jax.studies.statistics import ERROR_RATE, Difference, Scores, by_seed, difference, holm

FLAT = 0.02  # nats: a loss that falls less over the last fifth of the steps is flat
SAME = 0.02  # nats: losses whose difference lies within are called the same
MAIN_DATA = 'shapes'  # the data set of the primary comparisons
NO_LEVELS = ', no levels'
# The arms whose residuals are pooled.
ARMS = (*KINDS, *(kind + NO_LEVELS for kind in ('normalised', 'rounded', 'none')))
PERCENT = 100

Score = Callable[[PositionsResult], float | None]  # None: not measured
Expected = Literal['lower', 'higher', 'same']
Verdict = Literal['confirmed', 'refuted', 'left open', 'not measured']


def final_loss(result: PositionsResult) -> float:
    return result.curve[-1].loss


def area(result: PositionsResult) -> float:
    return result.area


def untrained_loss(result: PositionsResult) -> float | None:
    """The loss at the larger size, without training there."""
    return result.larger and result.larger.before.loss


def two_objects(result: PositionsResult) -> float | None:
    """The share of the images of two objects that show all that is stated."""
    return next((one.all for one in result.aligned if one.objects == 2), None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
    """A primary comparison.

    Attributes:
        source: the paper or the authors that make the claim.
        statement: the claim, in words.
        score: the compared score.
        first: an arm.
        second: the arm that it is compared with.
        expected: how the first arm's score compares with the second's if the claim holds.
    """

    source: str
    statement: str
    score: Score
    first: str
    second: str
    expected: Expected

    def verdict(self, found: Difference | None, adjusted: float) -> Verdict:
        """The verdict, given the difference and its p value adjusted for all claims."""
        if found is None:
            return 'not measured'
        if self.expected == 'same':
            if max(abs(found.low), abs(found.high)) <= SAME:
                return 'confirmed'
            apart = min(abs(found.low), abs(found.high)) > SAME and found.low * found.high > 0
            return 'refuted' if apart and adjusted < ERROR_RATE else 'left open'
        if adjusted >= ERROR_RATE:
            return 'left open'
        lower = found.value < 0
        return 'confirmed' if lower == (self.expected == 'lower') else 'refuted'


CLAIMS = (
    Claim(
        source='STAR',
        statement='normalised positions converge faster than a learned table (area)',
        score=area,
        first='normalised',
        second='learned',
        expected='lower',
    ),
    Claim(
        source='STAR',
        statement='normalised positions carry to a larger size better than raw ones (loss there)',
        score=untrained_loss,
        first='normalised',
        second='raw',
        expected='lower',
    ),
    Claim(
        source='Infinity',
        statement='normalised positions need a level embedding (final loss)',
        score=final_loss,
        first='normalised' + NO_LEVELS,
        second='normalised',
        expected='higher',
    ),
    Claim(
        source='Infinity',
        statement='rounded positions need a level embedding (final loss)',
        score=final_loss,
        first='rounded' + NO_LEVELS,
        second='rounded',
        expected='higher',
    ),
    Claim(
        source='LlamaGen',
        statement='rotary positions converge faster than a learned table (area)',
        score=area,
        first='raw',
        second='learned',
        expected='lower',
    ),
    Claim(
        source='LlamaGen',
        statement='rotary positions end at the same loss as a learned table (final loss)',
        score=final_loss,
        first='raw',
        second='learned',
        expected='same',
    ),
    Claim(
        source="VAR's maintainers",
        statement='normalised rotary positions follow text better (two objects right)',
        score=two_objects,
        first='normalised',
        second='learned',
        expected='higher',
    ),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """A claim with its result.

    Attributes:
        claim: the claim.
        found: the difference; None where units are missing.
        by_seed: the difference of every seed, of which `found` is the mean.
        adjusted: its p value by Holm's correction over all claims; None where units are missing.
        verdict: confirmed, refuted or left open.
    """

    claim: Claim
    found: Difference | None
    by_seed: tuple[float, ...]
    adjusted: float | None
    verdict: Verdict


def load(folder: Path) -> tuple[list[PositionsResult], list[ReferenceResult]]:
    """The results in a folder.

    Raises UserError for a damaged file, and for units of several commits, settings or tokenizers.
    """
    results, references = [], []
    for path in units.unit_files(folder):
        result = units.read(path, _result_class)
        (references if isinstance(result, ReferenceResult) else results).append(result)
    provenance.check_equal('commits', [*results, *references], lambda one: one.commit, folder)
    for data in sorted({one.data for one in results}):
        of_data = [one for one in (*results, *references) if one.data == data]
        provenance.check_equal('settings', of_data, lambda one: one.settings, folder)
        provenance.check_equal('tokenizers', of_data, lambda one: one.tokenizer, folder)
    _check_arms(results)
    return results, references


def _result_class(fields: Any) -> type:
    is_reference = isinstance(fields, dict) and fields.get('kind') == REFERENCE
    return ReferenceResult if is_reference else PositionsResult


def answers(results: Sequence[PositionsResult]) -> list[Answer]:
    """The primary comparisons over the arms of the main data set."""
    arms = [one for one in _finished(results, MAIN_DATA) if one.arm in ARMS]
    scores = [_scores(arms, claim.score) for claim in CLAIMS]
    found = [
        difference(score, claim.first, claim.second)
        for claim, score in zip(CLAIMS, scores, strict=True)
    ]
    adjusted = iter(holm([one.p for one in found if one is not None]))
    listed = []
    for claim, score, one in zip(CLAIMS, scores, found, strict=True):
        p = None if one is None else next(adjusted)
        listed.append(
            Answer(
                claim=claim,
                found=one,
                by_seed=by_seed(score, claim.first, claim.second),
                adjusted=p,
                verdict=claim.verdict(one, 1.0 if p is None else p),
            )
        )
    return listed


def paths(out: Path) -> list[Path]:
    """The files of a report: numbers, tables and curves."""
    return [*report_files.paths(out), _curves_path(out)]


def write(folder: Path, out: Path, console: Console, cost: CostResult | None = None) -> None:
    """Writes OUT.json, OUT_tables.md and OUT.png from the units in a folder, and prints the tables.

    Args:
        folder: the folder.
        out: prefix of the paths of the files.
        console: shows the tables.
        cost: the cost of every kind, whose tables are added.

    Raises:
        UserError: as `load`.
        OSError: a file cannot be written.
    """
    results, references = load(folder)
    parts = [*tables(results, references), sentence(results)]
    numbers = _numbers(results, references, answers(results))
    report_files.write(parts, numbers, cost, out, console)
    curves = {
        arm: [[(point.step, point.loss) for point in one.curve] for one in of_arm]
        for arm, of_arm in _by_arm(_finished(results, MAIN_DATA)).items()
    }
    if curves:
        most = max(map(len, curves.values()))
        with files.replacing(_curves_path(out)) as temporary:
            plot(curves, f'{most} seeds' if most > 1 else 'one seed', temporary)


def _curves_path(out: Path) -> Path:
    return out.with_name(f'{out.name}.png')


def sentence(results: Sequence[PositionsResult]) -> str:
    """Sentences that name the code, the machines and the statistics of the tables."""
    return (
        f'{provenance.of_units(results)} A difference is estimated in the additive model arm + '
        'seed over the ten arms of shapes; intervals are unadjusted 95 %, and a claim is decided '
        f"by Holm's correction at {ERROR_RATE:.0%} over the primary comparisons."
    )


def tables(
    results: Sequence[PositionsResult], references: Sequence[ReferenceResult]
) -> list[Cells]:
    """The tables of the report."""
    listed = [_claims(answers(results))]
    for data in sorted({one.data for one in results}, key=lambda name: (name != MAIN_DATA, name)):
        arms = _by_arm(_finished(results, data))
        if not arms:
            continue
        listed += [_losses(data, arms), _by_scale(data, arms)]
        if any(one.aligned for of_arm in arms.values() for one in of_arm):
            listed.append(_alignment(data, arms, references))
        if any(one.larger for of_arm in arms.values() for one in of_arm):
            listed.append(_larger(data, arms))
    if failed := [one for one in results if one.failure]:
        rows = [[f'{one.data}, {one.arm}, seed {one.seed}', one.failure] for one in failed]
        listed.append(Cells(title='Failed units', columns=['unit', 'reason'], rows=rows))
    return listed


def _claims(listed: Sequence[Answer]) -> Cells:
    rows = []
    for answer in listed:
        found, share = answer.found, answer.claim.score is two_objects
        value = interval = p = ''
        factor, digits = (PERCENT, 1) if share else (1, 3)
        if found is not None:
            value, low, high = (f'{factor * x:+.{digits}f}' for x in _ends(found))
            interval, p = f'[{low}, {high}]', f'{answer.adjusted:.2g}'
        claim = f'{answer.claim.source}: {answer.claim.statement}'
        arms = f'{answer.claim.first} - {answer.claim.second}'
        seeds = ' '.join(f'{factor * x:+.{digits}f}' for x in answer.by_seed)
        rows.append([claim, answer.verdict, value, p, interval, seeds, arms])
    columns = ['claim', 'verdict', 'difference', 'p (Holm)', '95 %', 'by seed', 'of']
    return Cells(title='Primary comparisons (nats; percentage points)', columns=columns, rows=rows)


def _ends(found: Difference) -> tuple[float, float, float]:
    return found.value, found.low, found.high


def _losses(data: str, arms: Mapping[str, Sequence[PositionsResult]]) -> Cells:
    rows = []
    for arm, of_arm in arms.items():
        fall = statistics.fmean(one.fall for one in of_arm)
        rows.append(
            [
                arm,
                str(len(of_arm)),
                _mean([area(one) for one in of_arm]),
                _mean([final_loss(one) for one in of_arm]),
                _mean([PERCENT * one.curve[-1].accuracy for one in of_arm], 1),
                f'{fall:.3f}{" (flat)" if fall < FLAT else ""}',
                f'{of_arm[0].parameters:,}',
            ]
        )
    columns = ['arm', 'seeds', 'area', 'final loss', 'accuracy, %', 'last fifth', 'parameters']
    return Cells(title=f'{data}: held-out loss, nats a token', columns=columns, rows=rows)


def _by_scale(data: str, arms: Mapping[str, Sequence[PositionsResult]]) -> Cells:
    scales = len(next(iter(arms.values()))[0].curve[-1].scales)
    rows = [
        [arm, *(_mean([one.curve[-1].scales[k] for one in of_arm]) for k in range(scales))]
        for arm, of_arm in arms.items()
    ]
    columns = ['arm', *(f'scale {k}' for k in range(scales))]
    return Cells(title=f'{data}: final held-out loss by scale, nats', columns=columns, rows=rows)


def _alignment(
    data: str,
    arms: Mapping[str, Sequence[PositionsResult]],
    references: Sequence[ReferenceResult],
) -> Cells:
    objects = [one.objects for one in next(iter(arms.values()))[0].aligned]
    names = ('all', 'number', 'colours', 'shapes')
    rows = [
        [
            arm,
            *(
                _mean([PERCENT * getattr(one.aligned[k], name) for one in of_arm], 1)
                for k in range(len(objects))
                for name in names
            ),
        ]
        for arm, of_arm in arms.items()
    ]
    for reference in references:
        if reference.data == data and reference.shipped:
            shares = [getattr(one, name) for one in reference.shipped for name in names]
            rows.append(['the shipped model', *(f'{PERCENT * share:.1f}' for share in shares)])
    columns = ['arm', *(f'{count}: {name}' for count in objects for name in names)]
    title = f'{data}: images that show what is stated, %, by number of objects'
    return Cells(title=title, columns=columns, rows=rows)


def _larger(data: str, arms: Mapping[str, Sequence[PositionsResult]]) -> Cells:
    rows = []
    for arm, of_arm in arms.items():
        larger = [one.larger for one in of_arm if one.larger]
        cells = [
            _mean([one.before.loss for one in larger]),
            _mean([one.after.loss for one in larger]),
        ]
        for name in ('aligned_before', 'aligned_after'):
            for k in range(len(getattr(larger[0], name))):
                cells.append(_mean([PERCENT * getattr(one, name)[k].all for one in larger], 1))
        rows.append([arm, *cells])
    first = next(iter(arms.values()))[0].larger
    objects = [one.objects for one in first.aligned_before]
    columns = ['arm', 'loss, untrained there', f'after {first.steps} steps']
    for when in ('untrained', 'trained'):
        columns += [f'{count} right, {when}, %' for count in objects]
    return Cells(title=f'{data}: carried to {first.size} px', columns=columns, rows=rows)


def _mean(values: Sequence[float], digits: int = 3) -> str:
    """The mean, and the standard deviation over seeds if there are several."""
    deviation = f' ± {statistics.stdev(values):.{digits}f}' if len(values) > 1 else ''
    return f'{statistics.fmean(values):.{digits}f}{deviation}'


def _numbers(
    results: Sequence[PositionsResult],
    references: Sequence[ReferenceResult],
    listed: Sequence[Answer],
) -> dict[str, Any]:
    """Answers and units, as JSON."""
    return {
        'primary': [
            {
                'source': answer.claim.source,
                'claim': answer.claim.statement,
                'first': answer.claim.first,
                'second': answer.claim.second,
                'difference': None if answer.found is None else dataclasses.asdict(answer.found),
                'by_seed': list(answer.by_seed),
                'p_holm': answer.adjusted,
                'verdict': answer.verdict,
            }
            for answer in listed
        ],
        'units': [config.to_json(one) for one in results],
        'reference': [config.to_json(one) for one in references],
    }


def _scores(results: Sequence[PositionsResult], score: Score) -> Scores:
    """The score of every unit that has it, by arm and seed."""
    scores = {(one.arm, one.seed): score(one) for one in results}
    return {key: value for key, value in scores.items() if value is not None}


def _finished(results: Sequence[PositionsResult], data: str) -> list[PositionsResult]:
    return [one for one in results if one.data == data and not one.failure]


def _by_arm(results: Sequence[PositionsResult]) -> dict[str, list[PositionsResult]]:
    """Results by arm, known arms first, each sorted by seed."""
    order = {arm: number for number, arm in enumerate(ARMS)}
    arms: dict[str, list[PositionsResult]] = {}
    for one in sorted(results, key=lambda one: (order.get(one.arm, len(ARMS)), one.arm, one.seed)):
        arms.setdefault(one.arm, []).append(one)
    return arms


def _check_arms(results: Sequence[PositionsResult]) -> None:
    """Raises UserError where one arm has two kinds of positions, or a unit occurs twice."""
    positions: dict[tuple[str, str], Any] = {}
    seen = set()
    for one in results:
        key = (one.data, one.arm)
        if positions.setdefault(key, one.positions) != one.positions:
            raise UserError(
                f'two units of {one.data}, {one.arm} have different positions '
                f'({positions[key]} and {one.positions}): keep those of one study in the folder'
            )
        if (*key, one.seed) in seen:
            raise UserError(f'{one.data}, {one.arm}, seed {one.seed} has two files: keep one')
        seen.add((*key, one.seed))
