"""Is text of users shown as it is: never as markup, and with control characters escaped?"""

import ast
import io
import logging
from pathlib import Path

import pytest

from star_jax import cli, terminal
from star_jax.console import Console, number_table, pairs, progress_bar, track

PACKAGE = Path(terminal.__file__).parent
MARKUP = (
    '[/]',
    '[bold]x',
    '[/bold]',
    '[link=file:///]x[/link]',
    ':cat:',
    r'\[a]',
    '[',
    '$x$',
    '@{',
)
CONTROLS = {
    '\x1b[2J\x1b[31m': '\\x1b[2J\\x1b[31m',  # clears the screen
    'a\rb': 'a\\rb',  # hides what precedes it
    'a\b\x7f': 'a\\x08\\x7f',
    '\x9b1m': '\\x9b1m',
    '\x00\x07': '\\x00\\x07',
    'a\u202eb': 'a\\u202eb',  # reverses the rest of the line
    'a\u2028b': 'a\\u2028b',
    '\udc80': '\\udc80',
}
PLAIN = ('a cat', 'Überschrift', '円', '👩\u200d🚀', 'e\u0301', '10\u202fkm', 'C:\\new')


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=120, force_terminal=False)


def shown(console: Console) -> str:
    return console.file.getvalue()


@pytest.mark.parametrize(('text', 'expected'), CONTROLS.items(), ids=ascii)
def test_control_characters_are_escaped(console, text, expected):
    assert terminal.printable(text) == expected
    console.print(text)
    assert shown(console) == f'{expected}\n'


@pytest.mark.parametrize('text', [*PLAIN, *MARKUP], ids=ascii)
def test_other_text_stays_as_it_is(console, text):
    assert terminal.printable(text) == text
    console.print(text, soft_wrap=True)
    assert shown(console) == f'{text}\n'


def test_lines_stay_lines(console):
    console.print('one\ntwo')
    assert shown(console) == 'one\ntwo\n'
    assert terminal.printable('one\ntwo\tthree') == 'one\\ntwo\\tthree'


@pytest.mark.parametrize('text', [*MARKUP, '\x1b[2J'], ids=ascii)
def test_tables_bars_and_status_lines_show_text_as_it_is(console, text):
    table = number_table(text, text)
    table.add_row(text, text)
    console.print(table)
    console.print(pairs(text, {text: text}))
    expected = terminal.printable(text)
    assert shown(console).count(expected) >= 7 and '\x1b' not in shown(console)
    live = Console(file=io.StringIO(), width=120, force_terminal=True, color_system=None)
    with progress_bar(live) as progress:
        progress.update(progress.add_task(text, total=2, note=text), completed=2)
    with live.status(text) as status:
        status.update(f'{text} {text}')
    assert shown(live).count(expected) >= 2 and '\x1b[2J' not in shown(live)


def test_track_counts_what_is_finished(capsys):
    assert list(track(iter('abc'), '[/]', 3)) == ['a', 'b', 'c']
    assert '[/]' in capsys.readouterr().err


def test_only_the_console_prints_with_rich():
    """Elsewhere a table is filled, and everything is printed by `star_jax.console`."""
    allowed = {'rich': {'box'}, 'rich.table': {'Table'}, 'rich.progress': {'Progress'}}
    for path in PACKAGE.rglob('*.py'):
        if path.name == 'console.py':
            continue
        for node in ast.walk(ast.parse(path.read_text('utf-8'))):
            if isinstance(node, ast.ImportFrom) and (node.module or '').split('.')[0] == 'rich':
                assert {alias.name for alias in node.names} <= allowed.get(node.module, set()), path
            elif isinstance(node, ast.Import):
                assert not any(alias.name.split('.')[0] == 'rich' for alias in node.names), path


def test_only_the_terminal_writes_text_of_users():
    """Other modules write constants to stdout, or results of a function that escapes."""
    for path in PACKAGE.rglob('*.py'):
        for node in ast.walk(ast.parse(path.read_text('utf-8'))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == 'sys.stdout.write':
                is_written = isinstance(node.args[0], ast.JoinedStr)
                assert not is_written or path.name in ('tpu_watch.py', 'worker.py'), path


@pytest.mark.parametrize('name', ['[/]', '[bold]', '\x1b[2J\x07', 'a\u202eb'], ids=ascii)
@pytest.mark.parametrize(
    'line',
    [
        'export {}',
        'sample a --model {}',
        'sample a --prompts {}/x',
        'sample a --seed {}',
        'train {}/x.py',
        'train {}/x.json',
        'convert {}/x.pth --out out',
        'data prepare folder {} out',
        'evaluate {}',
        'verify {}',
        'plan configs/quickstart.py --topology {}',
        'study run {}/x.py',
        '{}',
    ],
)
def test_errors_show_names_escaped_in_one_line(line, name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status = cli.main([word.replace('{}', name) for word in line.split()])
    output = capsys.readouterr()
    assert status == 2 and output.err.startswith('star-jax')
    text = output.out + output.err
    assert text.count('\n') == 1 and text.strip('\n') == terminal.printable(text.strip('\n'))


def test_warnings_show_names_escaped(capsys):
    terminal.redirect_warnings(lambda warning: cli._report('data', f'warning: {warning}', 0))
    log = logging.getLogger('star_jax')
    try:
        log.warning('%s is skipped', '\x1b[2J[/]')
    finally:
        log.removeHandler(log.handlers[-1])
        log.propagate = True
    assert capsys.readouterr().err == 'star-jax data: warning: \\x1b[2J[/] is skipped\n'
