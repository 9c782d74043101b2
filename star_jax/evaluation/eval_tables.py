"""How is a report of scores read by people?"""

from typing import Any

from rich import box
from rich.table import Table

from star_jax.evaluation.bootstrap import Score
from star_jax.evaluation.eval_report import ALIGNMENT, DRAWN, KID, KID_NAME, LOSS, TOKENIZER

HOW = ('split', 'objects', 'pictures', 'settings')  # fields of a row that are no score
WORDS = ('split', 'pictures')
HYPHENS = {'relations': 'rela-\ntions', 'background': 'back-\nground'}  # for narrow terminals
PERCENT = 100
THOUSAND = 1_000

Row = dict[str, Any]


def tables(report: dict[str, Any]) -> list[Table]:
    """One or two for each part of a report of `report.run`."""
    made = []
    if TOKENIZER in report:
        made += [_tokenizer(report[TOKENIZER]), _codes(report[TOKENIZER])]
    if LOSS in report:
        made.append(_loss(report[LOSS]))
    if ALIGNMENT in report:
        made.append(_alignment(report[ALIGNMENT]))
        made += _attributes(report[ALIGNMENT])
    if KID in report:
        made.append(_kid(report[KID]))
    return made


def summary(report: dict[str, Any]) -> str:
    """What was scored on what, and what was not."""
    lines = [
        f'{report["model"]} on {report["data"]} at {report["resolution"]} px, '
        f'seed {report["seed"]}; in brackets 95 % intervals (bootstrap over images)'
    ]
    settings = [row['settings'] for row in _drawn(report)]
    if settings:
        same = {n: v for n, v in settings[0].items() if all(s[n] == v for s in settings)}
        lines.append(f'drawn with {_name(same)}')
    if report['cross_attention'] != 'as_trained':
        lines.append(f'with the {report["cross_attention"]} cross-attention')
    lines += [f'without {part}: {why}' for part, why in report['skipped'].items()]
    return '\n'.join(lines)


def _drawn(report: dict[str, Any]) -> list[Row]:
    rows = report.get(ALIGNMENT, []) + report.get(KID, [])
    return [row for row in rows if row['pictures'] == DRAWN]


def _tokenizer(rows: list[Row]) -> Table:
    table = _table('What the tokenizer keeps', 'split', 'images', 'PSNR, dB', 'LPIPS', 'used')
    for row in rows:
        table.add_row(
            row['split'],
            str(row['images']),
            _show(row['psnr'], 2),
            _show(row['lpips'], 3),
            f'{row["used"]:.1%}',
        )
    return table


def _codes(rows: list[Row]) -> Table:
    table = _table('Codes of each scale', 'split', 'grid', 'used', 'perplexity')
    for row in rows:
        for scale in row['scales']:
            cells = (f'{scale["used"]:.1%}', f'{scale["perplexity"]:.1f}')
            table.add_row(row['split'], ' x '.join(map(str, scale['grid'])), *cells)
        table.add_section()
    return table


def _loss(rows: list[Row]) -> Table:
    table = _table('How codes are predicted', 'split', 'tokens', 'loss, nats', 'accuracy, %')
    for row in rows:
        for scale in [{'tokens': 'all', **row}, *row['scales']]:
            cells = (_show(scale['loss'], 3), _show(scale['accuracy'], 1, PERCENT))
            table.add_row(row['split'], str(scale['tokens']), *cells)
        table.add_section()
    return table


def _alignment(rows: list[Row]) -> Table:
    table = _table(
        'Pictures in which all that the caption says holds', 'split', 'objects', 'pictures', '%'
    )
    for some in _about_the_same(rows, 'split', 'objects'):
        for row in some:
            share = _show(row['all'], 1, PERCENT)
            table.add_row(row['split'], _objects(row), _made(row, rows), share)
        table.add_section()
    return table


def _attributes(rows: list[Row]) -> list[Table]:
    """What of it holds, in percent: a table for each split."""
    names = [name for name in rows[0] if name not in (*HOW, 'all')]
    tables = []
    for split in _about_the_same(rows, 'split'):
        title = f'What of it holds, %: {split[0]["split"]}'
        table = _table(title, 'objects', 'pictures', *(HYPHENS.get(name, name) for name in names))
        table.padding = 0
        for some in _about_the_same(split, 'objects'):
            for row in some:
                cells = (_show(row[name], 0, PERCENT, interval=False) for name in names)
                table.add_row(_objects(row), _made(row, rows), *cells)
            table.add_section()
        tables.append(table)
    return tables


def _about_the_same(rows: list[Row], *fields: str) -> list[list[Row]]:
    """The rows, those together that agree in these fields."""
    alike: dict[str, list[Row]] = {}
    for row in rows:
        alike.setdefault(str([row[field] for field in fields]), []).append(row)
    return list(alike.values())


def _objects(row: Row) -> str:
    return ' or '.join(map(str, row['objects']))


def _kid(rows: list[Row]) -> Table:
    table = _table('Distance', 'split', 'images', 'pictures', f'{KID_NAME}, x 1000')
    for row in rows:
        score = row[KID_NAME]
        cells = (str(score.count), _made(row, rows), _show(score, 2, THOUSAND))
        table.add_row(row['split'], *cells)
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify='left', box=box.SIMPLE, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, justify='left' if column in WORDS else 'right')
    return table


def _made(row: Row, rows: list[Row]) -> str:
    """How pictures were made, with those settings in which the rows differ."""
    given = row['settings']
    if given is None:
        return row['pictures']
    others = [other['settings'] for other in rows if other['settings'] is not None]
    own = {n: v for n, v in given.items() if any(other[n] != v for other in others)}
    return ', '.join(filter(None, (row['pictures'], _name(own))))


def _name(settings: dict[str, Any]) -> str:
    return ', '.join(filter(None, map(_setting, settings, settings.values())))


def _setting(name: str, value: Any) -> str:
    """A setting as an option names it; nothing for what is off."""
    if isinstance(value, dict):  # stable sampling
        return '' if value['version'] == 'off' else f'{name} {value["version"]}'
    if isinstance(value, bool):
        return name if value else ''
    return f'{name.replace("_", "-")} {value:g}'


def _show(score: Score | None, digits: int, times: float = 1, interval: bool = True) -> str:
    if score is None:
        return '-'
    value, low, high = (f'{times * x:.{digits}f}' for x in (score.value, score.low, score.high))
    return f'{value} ({low} to {high})' if interval else value
