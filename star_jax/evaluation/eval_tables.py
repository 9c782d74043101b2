"""How is a report printed in a terminal?"""

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

from star_jax.evaluation.bootstrap import Score
from star_jax.evaluation.eval_report import ALIGNMENT, KID, KID_NAME, LOSS, SAMPLED, TOKENIZER

NAME_FIELDS = ('split', 'objects', 'images', 'settings')  # fields of a row that are not scores
TEXT_COLUMNS = ('split', 'images')
# Breaks in headers, for narrow terminals.
HYPHENS = {'colours': 'col-\nours', 'relations': 'rela-\ntions', 'background': 'back-\nground'}
PERCENT = 100
THOUSAND = 1_000

Row = dict[str, Any]


def tables(report: dict[str, Any]) -> list[Table]:
    """The tables of a report of `eval_report.run`, one or more for each metric."""
    tables = []
    if TOKENIZER in report:
        tables += [_tokenizer(report[TOKENIZER]), _codes(report[TOKENIZER])]
    if LOSS in report:
        tables.append(_loss(report[LOSS]))
    if ALIGNMENT in report:
        tables.append(_alignment(report[ALIGNMENT]))
        tables += _attributes(report[ALIGNMENT])
    if KID in report:
        tables.append(_kid(report[KID]))
    return tables


def summary(report: dict[str, Any]) -> str:
    """Lines that name the model, the data, the settings and the skipped metrics."""
    lines = [
        f'{report["model"]} on {report["data"]} at {_format_grid(report["resolution"])} px, '
        f'seed {report["seed"]}; in brackets 95 % intervals (bootstrap over images)'
    ]
    settings = [row['settings'] for row in _sampled_rows(report)]
    if settings:
        common = {n: v for n, v in settings[0].items() if all(s[n] == v for s in settings)}
        lines.append(f'sampled with {_format_settings(common)}')
    if report['cross_attention'] != 'as_trained':
        lines.append(f'with the {report["cross_attention"]} cross-attention')
    lines += [f'without {metric}: {reason}' for metric, reason in report['skipped'].items()]
    return '\n'.join(lines)


def _sampled_rows(report: dict[str, Any]) -> list[Row]:
    rows = report.get(ALIGNMENT, []) + report.get(KID, [])
    return [row for row in rows if row['images'] == SAMPLED]


def _tokenizer(rows: list[Row]) -> Table:
    table = _table('Reconstruction', ['split', 'count', 'PSNR, dB', 'LPIPS', 'used codes'])
    for row in rows:
        table.add_row(
            row['split'],
            str(row['count']),
            _format_score(row['psnr'], 2),
            _format_score(row['lpips'], 3),
            f'{row["used"]:.1%}',
        )
    return table


def _codes(rows: list[Row]) -> Table:
    table = _table('Codes of each scale', ['split', 'grid', 'used codes', 'perplexity'])
    for row in rows:
        for scale in row['scales']:
            cells = (f'{scale["used"]:.1%}', f'{scale["perplexity"]:.1f}')
            table.add_row(row['split'], _format_grid(scale['grid']), *cells)
        table.add_section()
    return table


def _loss(rows: list[Row]) -> Table:
    table = _table('Prediction of codes', ['split', 'tokens', 'loss, nats', 'accuracy, %'])
    for row in rows:
        for scale in [{'tokens': 'all', **row}, *row['scales']]:
            cells = (
                _format_score(scale['loss'], 3),
                _format_score(scale['accuracy'], 1, scale=PERCENT),
            )
            table.add_row(row['split'], str(scale['tokens']), *cells)
        table.add_section()
    return table


def _alignment(rows: list[Row]) -> Table:
    title = 'Images that show all that their caption states, and nothing else'
    table = _table(title, ['split', 'objects', 'images', '%'])
    for group in _group_by(rows, 'split', 'objects'):
        for row in group:
            share = _format_score(row['all'], 1, scale=PERCENT)
            table.add_row(row['split'], _format_objects(row), _image_label(row, rows), share)
        table.add_section()
    return table


def _attributes(rows: list[Row]) -> list[Table]:
    """The single attributes of alignment, in percent: a table for each split."""
    names = [name for name in rows[0] if name not in (*NAME_FIELDS, 'all')]
    headers = [HYPHENS.get(name, name) for name in names]
    tables = []
    for split_rows in _group_by(rows, 'split'):
        title = f'Attributes of captions that hold, %: {split_rows[0]["split"]}'
        table = _table(title, ['objects', 'images', *headers])
        table.padding = 0
        for group in _group_by(split_rows, 'objects'):
            for row in group:
                cells = (
                    _format_score(row[name], 0, scale=PERCENT, interval=False) for name in names
                )
                table.add_row(_format_objects(row), _image_label(row, rows), *cells)
            table.add_section()
        tables.append(table)
    return tables


def _group_by(rows: list[Row], *fields: str) -> list[list[Row]]:
    """The rows, grouped by the values of these fields."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(str([row[field] for field in fields]), []).append(row)
    return list(groups.values())


def _format_objects(row: Row) -> str:
    return ' or '.join(map(str, row['objects']))


def _kid(rows: list[Row]) -> Table:
    title = 'Distance from the true images'
    table = _table(title, ['split', 'count', 'images', f'{KID_NAME}, x 1000'])
    for row in rows:
        score = row[KID_NAME]
        distance = _format_score(score, 2, scale=THOUSAND)
        table.add_row(row['split'], str(score.count), _image_label(row, rows), distance)
    return table


def _table(title: str, columns: list[str]) -> Table:
    table = Table(title=title, title_justify='left', box=box.SIMPLE, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, justify='left' if column in TEXT_COLUMNS else 'right')
    return table


def _image_label(row: Row, rows: list[Row]) -> str:
    """The origin of the images of a row, with those settings in which the rows differ."""
    settings = row['settings']
    if settings is None:
        return row['images']
    others = [other['settings'] for other in rows if other['settings'] is not None]
    swept = {n: v for n, v in settings.items() if any(other[n] != v for other in others)}
    return ', '.join(filter(None, (row['images'], _format_settings(swept))))


def _format_grid(grid: list[int]) -> str:
    return ' x '.join(map(str, grid))


def _format_settings(settings: dict[str, Any]) -> str:
    return ', '.join(filter(None, map(_format_setting, settings, settings.values())))


def _format_setting(name: str, value: Any) -> str:
    """A setting under the name of its option; '' if it is off."""
    if isinstance(value, dict):  # stable sampling
        return '' if value['version'] == 'off' else f'{name} {value["version"]}'
    if isinstance(value, bool):
        return name if value else ''
    if name == 'stop' and not value:
        return ''
    option = name.replace('_', '-')
    if isinstance(value, str):
        return f'{option} {value!r}' if value else ''
    if isinstance(value, Sequence):  # (0,) are the logits, where guidance acts by default
        return ' '.join([option, *map('{:g}'.format, value)]) if any(value) else ''
    return f'{option} {value:g}'


def _format_score(
    score: Score | None, digits: int, *, scale: float = 1, interval: bool = True
) -> str:
    """A score times `scale`, with its interval in brackets; '-' for None."""
    if score is None:
        return '-'
    value, low, high = (f'{scale * x:.{digits}f}' for x in (score.value, score.low, score.high))
    return f'{value} ({low} to {high})' if interval else value
