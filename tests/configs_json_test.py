"""Does a config survive JSON unchanged, and does an error name every invalid field?"""

import dataclasses
import json
from typing import Literal

import hypothesis
import hypothesis.strategies as st
import pytest

from star_jax.checkpoint import config
from star_jax.core.argument_types import OMITTED
from star_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rotary:
    theta: float = 100.0
    normalised: bool = True

    def __post_init__(self):
        if self.theta <= 0:
            raise ValueError(f'theta is {self.theta}, expected a positive number')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learned:
    tokens: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    depth: int
    sides: tuple[int, ...] = (1, 2, 4)
    window: tuple[int, float] = (2, 0.5)
    positions: Rotary | Learned = Rotary()
    extra: Rotary | None = None
    parts: tuple[Rotary | Learned | None, ...] = ()
    norm: Literal['layer', 'rms'] = 'layer'
    dtype: str | None = None
    smooth: float | bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    model: Model
    batch: int = 8


RUN = Run(
    model=Model(
        depth=2,
        positions=Learned(tokens=21),
        extra=Rotary(),
        parts=(Rotary(theta=3), Learned(tokens=1), None),
    )
)

numbers = st.floats(min_value=1e-6, allow_nan=False, allow_infinity=False)
rotary = st.builds(Rotary, theta=numbers, normalised=st.booleans())
learned = st.builds(Learned, tokens=st.integers())
models = st.builds(
    Model,
    depth=st.integers(),
    sides=st.lists(st.integers(), max_size=4).map(tuple),
    window=st.tuples(st.integers(), numbers),
    positions=rotary | learned,
    extra=st.none() | rotary,
    parts=st.lists(st.none() | rotary | learned, max_size=3).map(tuple),
    norm=st.sampled_from(['layer', 'rms']),
    dtype=st.none() | st.text(st.characters(codec='utf-8', exclude_characters='\0'), max_size=5),
    smooth=st.booleans() | numbers,
)


@hypothesis.settings(max_examples=50, deadline=None, database=None)
@hypothesis.given(st.builds(Run, model=models, batch=st.integers()))
def test_config_survives_json(run):
    text = json.dumps(config.to_json(run), allow_nan=False)
    again = config.from_json(Run, json.loads(text))
    assert again == run
    assert repr(again) == repr(run)
    assert hash(again) == hash(run)


def test_json_tags_unions_only():
    data = config.to_json(RUN)
    assert 'kind' not in data and 'kind' not in data['model']
    assert data['model']['positions'] == {'kind': 'Learned', 'tokens': 21}
    assert data['model']['extra']['kind'] == 'Rotary'
    assert [part and part['kind'] for part in data['model']['parts']] == ['Rotary', 'Learned', None]


def changed(path: str, value: object) -> dict:
    """RUN as JSON with one field replaced."""
    data = config.to_json(RUN)
    *parents, last = path.split('.')
    inner = data
    for name in parents:
        inner = inner[int(name) if name.isdigit() else name]
    inner[last] = value
    return data


@pytest.mark.parametrize(
    'path, value, field, message',
    [
        ('batch', '8', 'batch', 'given "8", expected a whole number'),
        ('batch', 8.5, 'batch', 'given 8.5, expected a whole number'),
        ('batch', True, 'batch', 'given true, expected a whole number'),
        ('batch', None, 'batch', 'given null'),
        ('btch', 8, 'btch', "Run has no such field, did you mean 'batch'"),
        ('model', 3, 'model', 'given 3, expected a Model object'),
        ('model.depht', 2, 'model.depht', "did you mean 'depth'"),
        ('model.sides', '124', 'model.sides', 'given "124", expected a list'),
        ('model.sides', [1, 'b'], 'model.sides[1]', 'given "b", expected a whole number'),
        ('model.window', [1], 'model.window', 'expected a list of 2'),
        ('model.norm', 'rsm', 'model.norm', "expected one of 'layer', 'rms'"),
        ('model.dtype', 3, 'model.dtype', 'given 3, expected a string or null'),
        ('model.smooth', 'x', 'model.smooth', 'expected a number or true or false'),
        ('model.positions', {'tokens': 3}, 'model.positions', "no 'kind' given"),
        ('model.positions.kind', 'Lerned', 'model.positions', "did you mean 'Learned'"),
        ('model.positions.theta', 3, 'model.positions.theta', 'Learned has no such field'),
        ('model.positions', None, 'model.positions', 'given null'),
        ('model.extra.theta', -1, 'model.extra', 'theta is -1.0, expected a positive number'),
        ('model.extra.theta', '1', 'model.extra.theta', 'given "1", expected a number'),
        ('model.extra.normalised', 1, 'model.extra.normalised', 'expected true or false'),
        ('model.extra.theta', 10**400, 'model.extra.theta', 'expected a finite number'),
        ('model.positions.kind', ['Learned'], 'model.positions', 'unknown kind ["Learned"]'),
        ('model.dtype', 'a\ud800', 'model.dtype', 'expected a string or null'),
        ('model.dtype', 'a\0', 'model.dtype', 'expected a string or null'),
        ('model.parts', [{'kind': 'Learned'}], 'model.parts[0].tokens', 'missing'),
    ],
)
def test_error_names_the_invalid_field(path, value, field, message):
    with pytest.raises(UserError) as caught:
        config.from_json(Run, changed(path, value), where='x.json')
    assert str(caught.value).startswith(f'x.json: {field}: ')
    assert message in str(caught.value)


def test_json_lacks_a_marked_field_at_its_default():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Marked:
        old: int = 1
        new: int = dataclasses.field(default=2, metadata=OMITTED)

    assert config.to_json(Marked()) == {'old': 1}
    assert config.to_json(Marked(new=3)) == {'old': 1, 'new': 3}
    for each in (Marked(), Marked(new=3)):
        assert config.from_json(Marked, config.to_json(each)) == each
    assert config.differences(Marked(), Marked(new=3)) == ['new: null -> 3']


def test_error_lists_at_most_eight_fields():
    with pytest.raises(UserError, match='model.depth: missing.*; batch: given') as caught:
        config.from_json(Run, {'model': {}, 'batch': 'x'})
    assert '\n' not in str(caught.value)
    with pytest.raises(UserError, match='and 12 more'):
        config.from_json(Run, {'model': {'depth': 1, 'sides': ['x'] * 20}})


def test_whole_numbers_and_floats_convert_without_loss():
    run = config.from_json(Run, {'model': {'depth': 2.0, 'extra': {'kind': 'Rotary', 'theta': 3}}})
    assert type(run.model.depth) is int
    assert type(run.model.extra.theta) is float


def test_config_survives_a_file(tmp_path):
    path = tmp_path / 'config.json'
    config.write(path, RUN)
    assert config.read(path, Run) == RUN
    assert [entry.name for entry in tmp_path.iterdir()] == ['config.json']


def test_invalid_config_is_not_written(tmp_path):
    path = tmp_path / 'config.json'
    config.write(path, RUN)
    with pytest.raises(UserError, match='batch: given "eight", expected a whole number'):
        config.write(path, dataclasses.replace(RUN, batch='eight'))
    with pytest.raises(UserError, match='nan or infinity'):
        config.write(path, Rotary(theta=float('inf')))
    with pytest.raises(UserError, match='holds a Run, expected a Rotary object or a Learned'):
        config.write(path, Model(depth=1, positions=RUN))
    assert config.read(path, Run) == RUN


@pytest.mark.parametrize('size', [0, 1, 40, 200])
def test_error_names_the_line_of_a_truncated_file(tmp_path, size):
    path = tmp_path / 'config.json'
    config.write(path, RUN)
    path.write_text(path.read_text()[:size])
    with pytest.raises(UserError, match=r'config.json: not valid JSON at line \d+'):
        config.read(path, Run)


def test_file_with_windows_line_ends_is_read(tmp_path):
    path = tmp_path / 'config.json'
    config.write(path, RUN)
    path.write_text(path.read_text().replace('\n', '\r\n'), 'utf-8-sig')
    assert config.read(path, Run) == RUN


def test_files_without_json_are_refused(tmp_path):
    path = tmp_path / 'config.json'
    with pytest.raises(UserError, match='no such file'):
        config.read(path, Run)
    path.write_bytes(b'\xff\xfe\x00')
    with pytest.raises(UserError, match='not valid JSON'):
        config.read(path, Run)
    path.write_text('{"theta": NaN}')
    with pytest.raises(UserError, match='NaN is not a JSON number'):
        config.read(path, Rotary)


def test_differences_name_fields_and_both_values():
    other = Run(
        model=dataclasses.replace(
            RUN.model,
            depth=4,
            sides=(1, 2),
            positions=Rotary(),
            extra=None,
            parts=(Rotary(theta=5), Learned(tokens=1), None),
        )
    )
    assert config.differences(RUN, RUN) == []
    assert config.differences(RUN, other) == [
        'model.depth: 2 -> 4',
        'model.sides: [1, 2, 4] -> [1, 2]',
        'model.positions: Learned -> Rotary',
        'model.extra: Rotary -> null',
        'model.parts[0].theta: 3 -> 5',
    ]


def test_whole_number_in_a_float_field_is_no_difference():
    assert config.differences(Rotary(theta=3), Rotary(theta=3.0)) == []


def test_run_loads_from_python_and_from_json(tmp_path):
    path = tmp_path / 'small.py'
    path.write_text('import fractions\nrun = fractions.Fraction(1, 2)\nother = 3\n')
    assert config.load_run(path).denominator == 2
    assert config.load_run(str(path), int, name='other') == 3
    config.write(tmp_path / 'config.json', RUN)
    assert config.load_run(tmp_path / 'config.json', Run) == RUN


@pytest.mark.parametrize(
    'source, message',
    [
        ('x = 1\n', "defines no 'run'"),
        ('run = 1\n', "'run' is a int, expected a Run object"),
        ('x = 1\nrun = (\n', 'small.py, line 2: '),
        ('import json\n\nrun = json.loads("{")\n', 'small.py, line 3: .*JSONDecodeError'),
    ],
)
def test_error_names_the_line_of_an_invalid_python_file(tmp_path, source, message):
    path = tmp_path / 'small.py'
    path.write_text(source)
    with pytest.raises(UserError, match=message):
        config.load_run(path, Run)


def test_paths_without_a_run_are_refused(tmp_path):
    with pytest.raises(UserError, match='cannot be read'):
        config.load_run(tmp_path / 'missing.py', Run)
    with pytest.raises(UserError, match='expected a .py file'):
        config.load_run(tmp_path, Run)
