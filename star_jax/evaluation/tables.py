"""How is a report of scores read by people?"""

from typing import Any

from rich.table import Table

from star_jax.evaluation.report import ALIGNMENT, KID, KID_NAME, LOSS, TOKENIZER
from star_jax.evaluation.statistics import Score

HOW = ('split', 'objects', 'pictures', 'settings')  # columns of a row that are no score
PERCENT = '{:.1%}'


def tables(report: dict[str, Any]) -> list[Table]:
    """One for each part of a report of `report.run`."""
    made = []
    if TOKENIZER in report:
        made += [_tokenizer(report[TOKENIZER]), _codes(report[TOKENIZER])]
    if LOSS in report:
        made.append(_loss(report[LOSS]))
    if ALIGNMENT in report:
        made.append(_alignment(report[ALIGNMENT]))
    if KID in report:
        made.append(_kid(report[KID]))
    return made


def summary(report: dict[str, Any]) -> str:
    """What was scored on what, and what was not."""
    head = (
        f'{report["model"]} on {report["data"]} at {report["resolution"]} px, '
        f'seed {report["seed"]}; in brackets the 95 % interval (bootstrap over images)'
    )
    return '\n'.join([head, *(f'skipped {part}: {why}' for part, why in report['skipped'].items())])


def _tokenizer(rows: list[dict]) -> Table:
    table = _table('What the tokenizer keeps', 'split', 'images', 'PSNR, dB', 'LPIPS', 'codes used')
    for row in rows:
        ratio, distance = _show(row['psnr'], '{:.2f}'), _show(row['lpips'], '{:.4f}')
        used = PERCENT.format(row['used'])
        table.add_row(row['split'], str(row['images']), ratio, distance, used)
    return table


def _codes(rows: list[dict]) -> Table:
    table = _table('Codes by scale', 'split', 'side', 'used', 'perplexity')
    for row in rows:
        for scale in row['scales']:
            cells = (PERCENT.format(scale['used']), f'{scale["perplexity"]:.1f}')
            table.add_row(row['split'], str(scale['side']), *cells)
    return table


def _loss(rows: list[dict]) -> Table:
    table = _table('How codes are predicted', 'split', 'tokens', 'loss, nats', 'accuracy')
    for row in rows:
        for scale in [{'tokens': 'all', **row}, *row['scales']]:
            cells = (_show(scale['loss'], '{:.3f}'), _show(scale['accuracy'], PERCENT))
            table.add_row(row['split'], str(scale['tokens']), *cells)
    return table


def _alignment(rows: list[dict]) -> Table:
    names = [name for name in rows[0] if name not in HOW]
    table = _table('Pictures in which all that the caption says holds', *HOW, *names)
    for row in rows:
        cells = (_show(row[name], PERCENT, interval=name == names[0]) for name in names)
        objects = ' or '.join(map(str, row['objects']))
        table.add_row(row['split'], objects, row['pictures'], _settings(row), *cells)
    return table


def _kid(rows: list[dict]) -> Table:
    table = _table(f'{KID_NAME} x 1000', 'split', 'images', 'pictures', 'settings', 'distance')
    for row in rows:
        score = row[KID_NAME]
        thousand = Score(
            value=1e3 * score.value, low=1e3 * score.low, high=1e3 * score.high, count=score.count
        )
        cells = (row['pictures'], _settings(row), _show(thousand, '{:.2f}'))
        table.add_row(row['split'], str(score.count), *cells)
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify='left')
    for column in columns:
        words = column in HOW
        table.add_column(column, justify='left' if words else 'right', overflow='fold')
    return table


def _settings(row: dict) -> str:
    given = row['settings']
    if given is None:
        return ''
    if given['smooth']:
        return f'guidance {given["guidance"]:g}, smooth'
    return ', '.join(
        f'{name.replace("_", "-")} {given[name]:g}'
        for name in ('guidance', 'top_k', 'top_p', 'temperature')
    )


def _show(score: Score | None, form: str, interval: bool = True) -> str:
    if score is None:
        return '-'
    value = form.format(score.value)
    return f'{value} ({form.format(score.low)} to {form.format(score.high)})' if interval else value
