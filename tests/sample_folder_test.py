"""Does a folder of sampled images continue, and refuse other images?"""

import json
import types

import numpy as np
import pytest

from star_jax.checkpoint import models
from star_jax.commands.sample import Sample, _shared_record
from star_jax.errors import UserError
from star_jax.sampling.image_size import ImageSize
from star_jax.sampling.sample_folder import SampleFolder

IMAGE = np.zeros((4, 4, 3), np.uint8)


def records(**settings) -> list[dict]:
    settings = {'top_k': 5, 'stable': {'version': 'off'}} | settings
    prompts = enumerate('ab')
    return [{'prompt': text, 'seed': seed, 'settings': settings} for seed, text in prompts]


def test_removed_image_is_written_again_and_keeps_one_line(tmp_path):
    with SampleFolder(tmp_path, records()) as folder:
        for index in folder.missing():
            folder.add(index, IMAGE)
    before = (tmp_path / 'samples.jsonl').read_text()
    assert [json.loads(line)['prompt'] for line in before.splitlines()] == ['a', 'b']
    (tmp_path / '000000.png').unlink()
    with SampleFolder(tmp_path, records()) as folder:
        assert folder.missing() == [0]
        folder.add(0, IMAGE)
        assert folder.missing() == []
    assert (tmp_path / '000000.png').exists()
    assert (tmp_path / 'samples.jsonl').read_text() == before


@pytest.mark.parametrize(
    ('options', 'varies'),
    [
        ({'dtype': 'bfloat16'}, True),
        ({'text_dtype': 'bfloat16'}, False),
        ({'dtype': 'bfloat16', 'exact': True}, False),
        ({'dtype': 'bfloat16', 'share': (0, 1)}, False),
        ({}, False),
    ],
)
def test_images_of_shares_vary_in_bfloat16_unless_they_are_exact(options, varies):
    assert Sample(**{'share': (0, 2)} | options).varies_with_shares == varies


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'top_k': 6}, "its settings.top_k was '5' and would be '6'"),
        ({'stable': {'version': 'new'}}, "its settings.stable.version was 'off' and would be"),
        ({'smooth': None}, 'its settings.smooth was'),
    ],
)
def test_error_names_the_setting_that_differs(tmp_path, settings, message):
    with SampleFolder(tmp_path, records()) as folder:
        folder.add(0, IMAGE)
    with pytest.raises(UserError, match=message), SampleFolder(tmp_path, records(**settings)):
        pass


@pytest.mark.parametrize(
    ('side', 'resize', 'message'),
    [
        (64, 48, "its resize was '32' and would be '48'"),
        (96, 32, "its height was '64' and would be '96'"),
        (64, 0, "its resize was '32' and would be 'None'"),
        (32, 0, "its height was '64' and would be '32'"),
    ],
)
def test_resized_images_of_other_sizes_are_refused(tmp_path, monkeypatch, side, resize, message):
    monkeypatch.setattr(models, 'digest', lambda source: '0' * 64)

    def records(side: int, resize: int) -> list[dict]:
        pipe = types.SimpleNamespace(
            tokenizer=types.SimpleNamespace(resolution=(side, side)),
            size=(resize or side,) * 2,
            encoder=types.SimpleNamespace(reference=dict),
        )
        record = _shared_record(Sample(size=ImageSize(resize=resize)), pipe)
        return [{'prompt': 'a', 'seed': 0} | record]

    with SampleFolder(tmp_path, records(64, 32)) as folder:
        folder.add(0, IMAGE)
    with SampleFolder(tmp_path, records(64, 32)) as folder:
        assert folder.missing() == []
    with pytest.raises(UserError, match=message), SampleFolder(tmp_path, records(side, resize)):
        pass


@pytest.mark.parametrize('line', ['x', '3', '{}', '{"file": [1]}', '[' * 10**5])
def test_damaged_record_is_refused_by_name(tmp_path, line):
    (tmp_path / 'samples.jsonl').write_text(f'{line}\n')
    with (
        pytest.raises(UserError, match='samples.jsonl is no record of sampled images'),
        SampleFolder(tmp_path, records()),
    ):
        pass


@pytest.mark.parametrize('name', ['000001.png', 'grid.png'])
def test_images_of_something_else_are_not_overwritten(tmp_path, name):
    (tmp_path / name).write_bytes(b'mine')
    (tmp_path / 'notes.txt').write_bytes(b'mine')
    with pytest.raises(UserError, match=f'holds {name}, which no samples.jsonl there describes'):
        SampleFolder(tmp_path, records())
    assert (tmp_path / name).read_bytes() == b'mine' and len(list(tmp_path.iterdir())) == 2


def test_image_of_another_size_is_shown_as_it_is(tmp_path):
    with SampleFolder(tmp_path, records()) as folder:
        folder.add(0, IMAGE)
        folder.add(1, np.zeros((9, 7, 3), np.uint8))
        assert folder.grid().exists()


def many(count: int) -> list[dict]:
    return [{'prompt': 'a', 'seed': seed} for seed in range(count)]


def test_processes_divide_a_folder_and_another_number_of_them_continues(tmp_path):
    with (
        SampleFolder(tmp_path, many(7), (0, 2)) as first,
        SampleFolder(tmp_path, many(7), (1, 2)) as second,
    ):
        assert (first.missing(), second.missing()) == ([0, 2, 4, 6], [1, 3, 5])
        first.add(0, IMAGE)
        second.add(1, IMAGE)
        second.add(3, IMAGE)
        assert first.left() == 4
    with (tmp_path / 'samples-1-of-2.jsonl').open('a') as file:
        file.write('{"file": "0000')
    for number, missing in enumerate(([6], [4], [2, 5])):
        with SampleFolder(tmp_path, many(7), (number, 3)) as folder:
            assert folder.missing() == missing
            for index in missing:
                folder.add(index, IMAGE)
    with SampleFolder(tmp_path, many(7)) as folder:
        assert folder.missing() == [] and folder.left() == 0
        assert folder.grid().exists()
    images = sorted(path.name for path in tmp_path.glob('0*.png'))
    assert images == [f'{index:06d}.png' for index in range(7)]
    lines = [
        json.loads(line)['file']
        for path in tmp_path.glob('samples*.jsonl')
        for line in path.read_text().splitlines()
        if line.endswith('}')
    ]
    assert sorted(lines) == images


def test_a_share_belongs_to_one_process(tmp_path):
    with (
        SampleFolder(tmp_path, many(2), (0, 2)),
        pytest.raises(UserError, match='another process writes .*samples-0-of-2.jsonl'),
        SampleFolder(tmp_path, many(2), (0, 2)),
    ):
        pass
    with SampleFolder(tmp_path, many(2), (0, 2)) as folder:
        assert folder.missing() == [0]
