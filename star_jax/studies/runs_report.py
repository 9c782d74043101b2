"""Which tables follow from the results of a study of runs?

Every contender has the same seeds; differences are estimated in the additive model of
`studies.statistics` and have intervals. The same files give the same bytes.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from star_jax.checkpoint import config
from star_jax.console import Console
from star_jax.errors import UserError
from star_jax.studies import provenance, report_files, units
from star_jax.studies.cells import Cells
from star_jax.studies.cost_result import CostResult
from star_jax.studies.runs_result import RunResult, TokenizerResult
from star_jax.studies.statistics import Difference, Scores, difference, holm

PERCENT = 100

paths = report_files.paths  # this report has no further files


def write(folder: Path, out: Path, console: Console, cost: CostResult | None = None) -> None:
    """Writes the tables of the results in a folder, as JSON and Markdown, and prints them.

    Args:
        folder: the folder.
        out: prefix of the paths of the files.
        console: shows the tables.
        cost: the cost of every contender, whose tables are added.

    Raises:
        UserError: the folder has no results, results of several commits, contenders of different
            settings, or different tokenizers of one name.
        OSError: a file cannot be written.
    """
    results = [_read(path) for path in units.unit_files(folder)]
    provenance.check_equal('commits', results, lambda one: one.commit, folder)
    known = [one for one in results if one.tokenizer_digest]
    for name in sorted({one.tokenizer for one in known}):
        used = [one for one in known if one.tokenizer == name]
        what = f'tokenizers called {name}'
        provenance.check_equal(what, used, lambda one: one.tokenizer_digest, folder)
    made = provenance.of_units(results)
    parts = [
        *_tokenizers(results),
        *_contenders(results),
        f'{made} Differences are estimated in the additive model contender + seed.',
    ]
    numbers = {'units': [config.to_json(result) for result in results]}
    report_files.write(parts, numbers, cost, out, console)


def _read(path: Path) -> RunResult | TokenizerResult:
    return units.read(path, _result_class)


def _result_class(fields: Any) -> type:
    is_run = isinstance(fields, dict) and 'contender' in fields
    return RunResult if is_run else TokenizerResult


def _tokenizers(results: Sequence[Any]) -> list[Cells]:
    rows = [
        [one.tokenizer, f'{one.images:,}', one.failure or f'{one.psnr:.1f}']
        for one in results
        if isinstance(one, TokenizerResult)
    ]
    columns = ['tokenizer', 'images', 'PSNR, dB']
    return [Cells(title='Tokenizers', columns=columns, rows=rows)] if rows else []


def _contenders(results: Sequence[Any]) -> list[Cells]:
    runs = [one for one in results if isinstance(one, RunResult)]
    if not runs:
        return []
    names = list(dict.fromkeys(one.contender for one in sorted(runs, key=lambda one: one.seed)))
    names.sort(key=lambda name: name != runs[0].baseline)  # the baseline is first
    if len({one.baseline for one in runs}) > 1:
        raise UserError('the units are of several studies: report each of them alone')
    for name in names:
        if len({one.settings for one in runs if one.contender == name}) > 1:
            raise UserError(f'the units of {name} have different settings: they do not compare')
    rows = []
    good = [one for one in runs if not one.failure]
    shares = {(one.contender, one.seed): one.share for one in good if one.aligned}
    nats = {(one.contender, one.seed): one.nats for one in good}
    for name in names:
        mine = [one for one in runs if one.contender == name]
        finished = [one for one in mine if not one.failure]
        rows.append(
            [
                name,
                f'{len(finished)} of {len(mine)}',
                f'{mine[0].parameters:,}',
                str(mine[0].tokens),
                _spread([one.nats for one in finished], 1),
                _spread([PERCENT * one.share for one in finished if one.aligned], 1),
            ]
        )
    columns = ['contender', 'seeds', 'parameters', 'tokens', 'nats per image', 'aligned, %']
    tables = [Cells(title='Contenders: mean (lowest to highest)', columns=columns, rows=rows)]
    if names[1:]:
        tables.append(_differences(names, nats, shares))
    return tables


def _differences(names: Sequence[str], nats: Scores, shares: Scores) -> Cells:
    """Every contender against the first, with Holm's adjusted p of their alignment."""
    first, others = names[0], names[1:]
    aligned = [difference(shares, name, first) for name in others]
    adjusted = iter(holm([one.p for one in aligned if one]))
    rows = [
        [
            f'{name} - {first}',
            _interval(difference(nats, name, first), 1),
            _interval(one, PERCENT),
            f'{next(adjusted):.3f}' if one else '',
        ]
        for name, one in zip(others, aligned, strict=True)
    ]
    columns = ['difference (95 % interval)', 'nats per image', 'aligned, points', 'adjusted p']
    return Cells(title='Differences', columns=columns, rows=rows)


def _spread(values: Sequence[float], digits: int) -> str:
    if not values:
        return ''
    mean, low, high = statistics.fmean(values), min(values), max(values)
    return f'{mean:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})'


def _interval(found: Difference | None, factor: float) -> str:
    if found is None:
        return 'not measured'
    value, low, high = (factor * x for x in (found.value, found.low, found.high))
    return f'{value:+.1f} ({low:+.1f} to {high:+.1f})'
