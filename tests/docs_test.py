"""Do the documents hold together: links, anchors, citations, paths and commands?"""

import ast
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from star_jax import cli
from star_jax.commands import arguments

ROOT = Path(__file__).parents[1]
DOCS = ROOT / 'docs'
SPECIFICATIONS = DOCS / 'specification'
README_BYTES = 9_000
PAGES = sorted([*ROOT.glob('*.md'), *DOCS.rglob('*.md')])
SOURCES = sorted(
    path
    for folder, pattern in (('star_jax', '*.py'), ('tests', '*.py'), ('configs', '*.py'))
    for path in (ROOT / folder).rglob(pattern)
    if path != Path(__file__)
)
FAMILIES = ('STAR', 'Infinity', 'LlamaGen')
NUMBER = r'\d+(?:\.\d+)?'
GAP = r'[\s#]+'  # a citation may go on in the next line of a comment
CITED = re.compile(
    rf"\b(?:(\w+)(?:'s)?{GAP})?[Ss]pecification{GAP}(?:sections?{GAP})?"
    rf'({NUMBER}(?:(?:\s*[-–,]\s*|\s+and\s+|,\s+and\s+){NUMBER})*)'
)
LINK = re.compile(r'\]\((?!https?://|mailto:)([^)\s]+)\)')
PATH = re.compile(r'`((?:star_jax|tests|configs|launch|docs)/[\w./-]*[\w/])`')
MODULE = re.compile(r'`((?!star_jax/|tests/|configs/|launch/|docs/)[\w-]+/[\w/]+\.py)`')


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def without_code(text: str) -> str:
    return re.sub(r'^```.*?^```', '', text, flags=re.MULTILINE | re.DOTALL)


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    heading = re.sub(r'<[^>]+>|[`*]', '', heading)
    heading = re.sub(r'\[([^]]*)\]\([^)]*\)', r'\1', heading).strip().lower()
    return re.sub(r'[^\w\- ]', '', heading).replace(' ', '-')


def anchors(page: Path) -> set[str]:
    text = page.read_text(encoding='utf-8')
    headings = re.findall(r'^#+ (.+)$', without_code(text), re.MULTILINE)
    return {*re.findall(r'<a id="([^"]+)">', text), *map(slug, headings)}


def citations(text: str) -> list[tuple[str, str]]:
    """(word before 'specification', section) of every citation."""
    return [
        (family, number)
        for family, numbers in CITED.findall(text)
        for number in re.findall(NUMBER, numbers)
    ]


@pytest.fixture(scope='module')
def sections() -> dict[str, set[str]]:
    return {name: anchors(SPECIFICATIONS / f'{name.lower()}.md') for name in FAMILIES}


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        ('(STAR specification 3.4)', [('STAR', '3.4')]),
        ('STAR\n# specification\n# 9)', [('STAR', '9')]),
        ('STAR specification 3, 5 and 7.1', [('STAR', '3'), ('STAR', '5'), ('STAR', '7.1')]),
        ("Infinity's specification 1.5-1.8", [('Infinity', '1.5'), ('Infinity', '1.8')]),
        ('(specification 2)', [('', '2')]),
        ('the specification is', []),
    ],
)
def test_citation_pattern_finds_sections(text, expected):
    assert citations(text) == expected


def test_citations_name_an_existing_section(sections):
    cited = [
        (relative(path), family, number)
        for path in [*SOURCES, *PAGES]
        for family, number in citations(path.read_text(encoding='utf-8'))
    ]
    assert len(cited) > 40
    assert all({'1', '2', '3'} < names for names in sections.values())
    wrong = [line for line in cited if line[2] not in sections.get(line[1], ())]
    assert wrong == [], 'write "STAR specification 3.4", with a section of docs/specification'


@pytest.mark.parametrize('page', PAGES, ids=relative)
def test_links_lead_to_files_and_anchors(page):
    wrong = []
    for link in LINK.findall(without_code(page.read_text(encoding='utf-8'))):
        name, _, anchor = link.partition('#')
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(link)
    assert wrong == []


@pytest.mark.parametrize('page', PAGES, ids=relative)
def test_paths_in_backticks_exist(page):
    if page.name == 'CHANGELOG.md':  # it names what was renamed
        return
    text = without_code(page.read_text(encoding='utf-8'))
    modules = {f'star_jax/{name}' for name in MODULE.findall(text)}
    named = {*PATH.findall(text), *modules}
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_documents_named_in_code_exist():
    scripts = [*(ROOT / 'launch').glob('*.sh'), ROOT / 'setup.py']
    named = {
        (relative(path), name)
        for path in [*SOURCES, *scripts]
        for name in re.findall(r'\bdocs/[\w/]+\.(?:md|png|json)\b', path.read_text('utf-8'))
    }
    assert [pair for pair in sorted(named) if not (ROOT / pair[1]).exists()] == []


def test_index_links_every_page():
    linked = {
        (DOCS / link.partition('#')[0]).resolve()
        for link in LINK.findall((DOCS / 'README.md').read_text(encoding='utf-8'))
    }
    pages = {page for page in PAGES if page.parent != ROOT and page != DOCS / 'README.md'}
    assert pages - linked == set()


def test_every_file_of_docs_is_linked():
    linked = {
        (page.parent / link.partition('#')[0]).resolve()
        for page in PAGES
        for link in LINK.findall(page.read_text(encoding='utf-8'))
    }
    files = {*DOCS.glob('*.png'), *DOCS.glob('*.json'), *SPECIFICATIONS.rglob('*.json')}
    assert files - linked == set()


def test_readme_is_short():
    assert len((ROOT / 'README.md').read_bytes()) <= README_BYTES


def test_readme_names_every_room():
    readme = (ROOT / 'README.md').read_text(encoding='utf-8')
    rooms = {path.parent.name for path in (ROOT / 'star_jax').glob('*/__init__.py')}
    assert [room for room in sorted(rooms) if f'`{room}/`' not in readme] == []


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced blocks of a page in one of the languages."""
    pattern = rf'^```(?:{"|".join(languages)})\n(.*?)^```'
    return re.findall(pattern, page.read_text(encoding='utf-8'), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[str]:
    """The `star-jax` commands in the blocks of a page, one line each."""
    lines = '\n'.join(blocks(page, 'bash', 'sh')).replace('\\\n', ' ').splitlines()
    calls = [re.search(r'(?:^|[\s/])(star-jax\s.*)', line) for line in lines]
    launched = [re.search(r'parallel\.flags (?:cpu|gpu|tpu) (.*)', line) for line in lines]
    found = [call[1] for call in calls if call] + [f'star-jax {one[1]}' for one in launched if one]
    return [line for line in found if not re.search(r'\.\.\.|COMMAND', line)]


ALL_COMMANDS = sorted({line for page in PAGES for line in commands(page)})


def expand(word: str) -> list[str]:
    """A pattern as the shell expands it."""
    return sorted(map(relative, ROOT.glob(word))) if '*' in word else [word]


class ParsedError(Exception):
    """The command line was parsed; nothing of it has run."""


@pytest.mark.parametrize('line', ALL_COMMANDS)
def test_printed_commands_parse(line, monkeypatch):
    parse = arguments.parse

    def parse_only(*args, **options):
        parse(*args, **options)
        raise ParsedError

    monkeypatch.setattr(arguments, 'parse', parse_only)
    monkeypatch.chdir(ROOT)
    words = shlex.split(line, comments=True)[1:]
    words = [name for word in words for name in expand(word)]
    if words == ['--version']:
        return
    with pytest.raises(ParsedError):
        cli.main(words)


def test_a_folder_is_the_output_of_one_command():
    """A second command would be refused: the folder holds the work of another."""
    found = {}
    for line in ALL_COMMANDS:
        words = shlex.split(line, comments=True)
        if words[1] in ('train', 'train-tokenizer', 'sample') and '--out' in words:
            found.setdefault(words[words.index('--out') + 1], set()).add(tuple(words))
    assert not {out: lines for out, lines in found.items() if len(lines) > 1}


@pytest.mark.parametrize('page', PAGES, ids=relative)
def test_shell_blocks_are_shell(page):
    for block in blocks(page, 'bash', 'sh'):
        checked = subprocess.run(['bash', '-n'], input=block, text=True, capture_output=True)
        assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize('page', PAGES, ids=relative)
def test_scripts_in_shell_blocks_exist(page):
    text = '\n'.join(blocks(page, 'bash', 'sh'))
    named = re.findall(r'\b((?:launch|configs|tests)/[\w/]+\.(?:sh|py))\b', text)
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize('page', PAGES, ids=relative)
def test_python_blocks_use_existing_names(page):
    """Each import works, and each `module.name` of an imported module of ours exists."""
    for block in blocks(page, 'python'):
        tree = ast.parse(block)
        names = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                exec(compile(ast.Module([node], []), relative(page), 'exec'), names)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                module = names.get(node.value.id)
                if getattr(module, '__name__', '').startswith('star_jax'):
                    assert hasattr(module, node.attr), f'{node.value.id}.{node.attr}'
