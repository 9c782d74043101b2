"""Does a folder of drawn pictures know what is in it?"""

import json

import numpy as np
import pytest

from star_jax.errors import UserError
from star_jax.sampling.sample_folder import SampleFolder

IMAGE = np.zeros((4, 4, 3), np.uint8)


def records(**settings) -> list[dict]:
    settings = {'top_k': 5, 'stable': {'version': 'off'}} | settings
    return [{'prompt': one, 'seed': seed, 'settings': settings} for seed, one in enumerate('ab')]


def test_a_picture_that_was_removed_is_drawn_again_and_has_one_line(tmp_path):
    album = SampleFolder(tmp_path, records())
    for index in album.missing():
        album.add(index, IMAGE)
    before = (tmp_path / 'samples.jsonl').read_text()
    assert [json.loads(line)['prompt'] for line in before.splitlines()] == ['a', 'b']
    (tmp_path / '00000.png').unlink()
    album = SampleFolder(tmp_path, records())
    assert album.missing() == [0]
    album.add(0, IMAGE)
    assert album.missing() == []
    assert (tmp_path / '00000.png').exists()
    assert (tmp_path / 'samples.jsonl').read_text() == before


@pytest.mark.parametrize(
    ('settings', 'said'),
    [
        ({'top_k': 6}, "its settings.top_k was '5' and would be '6'"),
        ({'stable': {'version': 'new'}}, "its settings.stable.version was 'off' and would be"),
        ({'smooth': None}, 'its settings.smooth was'),
    ],
)
def test_the_setting_that_differs_is_named(tmp_path, settings, said):
    SampleFolder(tmp_path, records()).add(0, IMAGE)
    with pytest.raises(UserError, match=said):
        SampleFolder(tmp_path, records(**settings))
