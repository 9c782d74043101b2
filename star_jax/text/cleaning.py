"""How are captions cleaned before LlamaGen's text encoder reads them?

`clean` applies the published steps twice, as training and sampling do (LlamaGen specification 4.4).
Each step reads the whole result of the step before; their order and their quirks are those of the
published code, because the released models were trained on such captions.
"""

import functools
import html
import re
import urllib.parse
import warnings
from collections.abc import Callable

from star_jax.errors import UserError

INSTALL = "pip install 'ftfy>=6.1' 'beautifulsoup4>=4.11'"

EXTENSION = '(?:png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)'
DOMAIN = '(?:com|co|ru|net|org|edu|gov|it)'
ADDRESS = rf'[a-zA-Z0-9.\-]+\.{DOMAIN}[\w/\-]*\b/?(?!@)'
DASHES = (
    '\u002d\u058a\u05be\u1400\u1806\u2010\u2011\u2012\u2013\u2014\u2015\u2e17\u2e1a\u2e3a\u2e3b'
    '\u2e40\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d'
)
SYMBOLS = '#&@~()[]{}/*|\\\u00ae\u2022\u00a9\u2122\u00b7\u00ba\u00bd\u00be\u00bf\u00a1\u00a7'
MOST_JOINERS = 3  # a text keeps at most so many '-' and '_'

Step = Callable[[str], str]


def clean(text: str) -> str:
    """The text as the encoder reads it: cleaned twice.

    Raises UserError where a package is missing.
    """
    return clean_once(clean_once(text))


def clean_once(text: str) -> str:
    """One application of all steps, in order."""
    for step in _steps():
        text = step(text)
    return text


def _without_tags(text: str) -> str:
    """The text of an HTML document; markup that no parser accepts stays."""
    import bs4

    with warnings.catch_warnings():  # about texts that resemble addresses and file names
        warnings.simplefilter('ignore')
        try:
            return bs4.BeautifulSoup(text, features='html.parser').text
        except (bs4.exceptions.ParserRejectedMarkup, AssertionError):
            return text


def _repaired(text: str) -> str:
    """The text without mojibake and without escapes."""
    import ftfy

    return html.unescape(html.unescape(ftfy.fix_text(text))).strip()


def _separated(text: str) -> str:
    """The text with blanks for '-' and '_', if it has many of them."""
    joiners = r'[\-_]'
    return re.sub(joiners, ' ', text) if len(re.findall(joiners, text)) > MOST_JOINERS else text


def _replace(pattern: str, by: str = '') -> Step:
    return functools.partial(re.compile(pattern).sub, by)


@functools.cache
def _steps() -> tuple[Step, ...]:
    """The steps of one application, numbered as in the specification.

    Raises UserError where a package is missing.
    """
    try:
        import bs4  # noqa: F401
        import ftfy  # noqa: F401
    except ImportError as error:
        raise UserError(
            f'captions of this model are cleaned by ftfy and Beautiful Soup, and {error.name} is '
            f'missing; run:\n{INSTALL}'
        ) from error
    return (
        urllib.parse.unquote_plus,  # 1
        str.strip,
        str.lower,
        _replace('<person>', 'person'),
        _replace(rf'\b(?:https?:(?:/{{1,3}}|[a-zA-Z0-9%])|{ADDRESS})'),  # 5
        _replace(rf'\b(?:www:(?:/{{1,3}}|[a-zA-Z0-9%])|{ADDRESS})'),
        _without_tags,
        _replace(r'@\w+'),
        _replace('[\u31c0-\u9fff]+'),
        _replace(f'[{re.escape(DASHES)}]+', '-'),  # 10
        _replace('[\u0060\u00b4\u00ab\u00bb\u201c\u201d\u00a8]', '"'),
        _replace('[\u2018\u2019]', "'"),
        _replace('&quot;?'),
        _replace('&amp'),
        _replace(r'\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}', ' '),  # 15
        _replace(r'\d:\d\d\s+\Z'),
        _replace(r'\\n', ' '),
        _replace(r'#\d{1,3}\b'),
        _replace(r'#\d{5,}\b'),
        _replace(r'\b\d{6,}\b'),  # 20
        _replace(rf'\S+\.{EXTENSION}'),
        _replace('["\']{2,}', '"'),
        _replace(r'\.{2,}', ' '),
        _replace(f'[{re.escape(SYMBOLS)}]+', ' '),
        _replace(r'\s+\.\s+', ' '),  # 25
        _separated,
        _repaired,
        _replace(r'\b[a-zA-Z]{1,3}\d{3,15}\b'),
        _replace(r'\b[a-zA-Z]+\d+[a-zA-Z]+\b'),
        _replace(r'\b\d+[a-zA-Z]+\d+\b'),  # 30
        _replace(r'(?:worldwide\s+)?(?:free\s+)?shipping'),
        _replace(r'(?:free\s)?download(?:\sfree)?'),
        _replace(r'\bclick\b\s(?:for|on)\s\w+'),
        _replace(rf'\b{EXTENSION}(?:\simages?)?'),
        _replace(r'\bpage\s+\d+\b'),  # 35
        _replace(r'\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b', ' '),
        _replace(r'\b\d+\.?\d*[x\u0445\u00d7]\d+\.?\d*\b'),
        _replace(r'\b\s+:\s+', ': '),
        _replace(r'(\D[,./])\b', r'\1 '),
        _replace(r'\s+', ' '),  # 40; 41 changes nothing
        _replace(r"""(?s)\A["'](.+)["']\Z""", r'\1'),
        _replace(r"\A['_,\-:;]"),
        _replace(r"['_,\-:+]\Z"),
        _replace(r'\A\.\S+\Z'),  # 45
        str.strip,
    )
