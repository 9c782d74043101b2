"""Are captions cleaned as LlamaGen's were?"""

import json
import sys
from pathlib import Path

import pytest

from star_jax.errors import UserError
from star_jax.text import cleaning

TABLE = Path(__file__).parents[1] / 'docs/specification/tables/llamagen_caption_cleaning.json'
CASES = json.loads(TABLE.read_text(encoding='utf-8'))['cases']


@pytest.mark.parametrize('case', CASES, ids=range(len(CASES)))
def test_a_recorded_caption_is_cleaned(case):
    pytest.importorskip('ftfy')
    pytest.importorskip('bs4')
    assert cleaning.clean_once(case['caption']) == case['once']
    assert cleaning.clean(case['caption']) == case['cleaned']


def test_markup_that_no_parser_accepts_stays_as_text():
    pytest.importorskip('ftfy')
    pytest.importorskip('bs4')
    assert 'a red kite' in cleaning.clean('a red kite <![weird[ x')


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, 'ftfy', None)
    cleaning._steps.cache_clear()
    with pytest.raises(UserError, match="pip install 'ftfy"):
        cleaning.clean('a red kite')
