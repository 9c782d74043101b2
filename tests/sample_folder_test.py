"""Does a folder of sampled images continue, and refuse other images?"""

import json

import numpy as np
import pytest

from star_jax.errors import UserError
from star_jax.sampling.sample_folder import SampleFolder

IMAGE = np.zeros((4, 4, 3), np.uint8)


def records(**settings) -> list[dict]:
    settings = {'top_k': 5, 'stable': {'version': 'off'}} | settings
    prompts = enumerate('ab')
    return [{'prompt': text, 'seed': seed, 'settings': settings} for seed, text in prompts]


def test_removed_image_is_written_again_and_keeps_one_line(tmp_path):
    folder = SampleFolder(tmp_path, records())
    for index in folder.missing():
        folder.add(index, IMAGE)
    before = (tmp_path / 'samples.jsonl').read_text()
    assert [json.loads(line)['prompt'] for line in before.splitlines()] == ['a', 'b']
    (tmp_path / '00000.png').unlink()
    folder = SampleFolder(tmp_path, records())
    assert folder.missing() == [0]
    folder.add(0, IMAGE)
    assert folder.missing() == []
    assert (tmp_path / '00000.png').exists()
    assert (tmp_path / 'samples.jsonl').read_text() == before


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'top_k': 6}, "its settings.top_k was '5' and would be '6'"),
        ({'stable': {'version': 'new'}}, "its settings.stable.version was 'off' and would be"),
        ({'smooth': None}, 'its settings.smooth was'),
    ],
)
def test_error_names_the_setting_that_differs(tmp_path, settings, message):
    SampleFolder(tmp_path, records()).add(0, IMAGE)
    with pytest.raises(UserError, match=message):
        SampleFolder(tmp_path, records(**settings))
