"""Which layouts, lists, containers and captions of a folder of images are read?"""

import dataclasses
import io
import json
import os
import tarfile
import unicodedata
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

from star_jax import cli
from star_jax.data import image_files, listing, lists, splits, tables, tree
from star_jax.data.folder import Folder
from star_jax.errors import UserError
from star_jax.evaluation import groups

COMPOSED, DECOMPOSED = 'caf\u00e9', 'cafe\u0301'


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> None:
    """A cache folder of its own for each test."""
    monkeypatch.setenv('STAR_JAX_CACHE', str(tmp_path_factory.mktemp('cache')))


def png(grey: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new('RGB', (16, 16), (grey, grey, grey)).save(file, 'PNG')
    return file.getvalue()


def add(root: Path, name: str, caption: str | None = None, grey: int = 0) -> None:
    """Writes a PNG with its caption beside it."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(grey))
    if caption is not None:
        path.with_suffix('.txt').write_text(caption, 'utf-8')


def pack(path: Path, members: dict[str, bytes]) -> None:
    """Writes a tar archive."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, 'w') as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def captions(root: Path, field: str = '') -> dict[str, tuple[str, ...]]:
    found = listing.read(root, field)
    assert not found.faults
    return dict(found.captions)


def kinds(root: Path) -> dict[str, str]:
    """Kinds of faults by name."""
    return {fault.name: fault.kind for fault in listing.read(root).faults}


# Lists.

LISTS = {
    'metadata.csv': 'file_name,text\na.png,"one, two"\nb.png,"three ""four"""\n',
    'captions.csv': 'ID;Image;Caption\r\n1;a.png;one, two\r\n2;b.png;"three ""four"""\r\n',
    'Metadata.TSV': 'file_name\ttext\n\na.png\tone, two\nb.png\t"three ""four"""\n',
    'metadata.json': json.dumps(
        [{'file_name': 'a.png', 'text': 'one, two'}, {'image': 'b.png', 'caption': 'three "four"'}],
        indent=2,
    ),
    'captions.json': json.dumps({'a.png': 'one, two', 'b.png': {'caption': ['three "four"']}}),
    'metadata.jsonl': json.dumps(
        [{'File_Name': 'a.png', 'TEXT': 'one, two'}, {'path': 'b.png', 'text': 'three "four"'}]
    ),
}


@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16'])
@pytest.mark.parametrize('name', LISTS)
def test_lists_of_every_format_are_read(tmp_path, name, encoding):
    for image in ('a.png', 'b.png'):
        add(tmp_path, image)
    (tmp_path / name).write_bytes(LISTS[name].encode(encoding))
    assert captions(tmp_path) == {'a.png': ('one, two',), 'b.png': ('three "four"',)}


def test_parquet_without_images_is_a_list(tmp_path):
    add(tmp_path, 'train/a.png')
    table = pa.table({'file_name': ['a.png', 'b.png'], 'text': ['an a', 'a b']})
    parquet.write_table(table, tmp_path / 'train' / 'metadata.parquet')
    found = listing.read(tmp_path)
    assert found.captions == {'train/a.png': ('an a',)}
    (fault,) = found.faults
    assert fault.kind == listing.NO_IMAGE and 'no train/b.png' in fault.reason


@pytest.mark.parametrize(
    'fields',
    [
        {'text': None, 'caption': 'good'},
        {'text': '', 'caption': 'good'},
        {'text': ' \u200b', 'caption': 'good'},
        {'text': [None], 'captions': ['good', None, '']},
        {'text': [], 'caption': 'good'},
        {'text': 3, 'caption': 'good'},
        {'file_name': None, 'image': 'a.png', 'text': 'good'},
        {'file_name': '', 'path': 'a.png', 'text': 'good'},
        {'text': None, 'Text': 'good'},
        {'TEXT': ' ', 'text': None, 'Text': 'good'},
        {'file_name': None, 'image': {'bytes': None, 'path': 'a.png'}, 'text': 'good'},
    ],
)
def test_missing_and_empty_values_lose_no_record(tmp_path, fields):
    add(tmp_path, 'a.png')
    record = {'file_name': 'a.png'} | fields
    (tmp_path / 'metadata.jsonl').write_text(json.dumps(record))
    assert captions(tmp_path) == {'a.png': ('good',)}


def test_null_in_every_field_is_no_caption(tmp_path):
    add(tmp_path, 'a.png')
    (tmp_path / 'metadata.jsonl').write_text('{"file_name": "a.png", "text": null}')
    assert kinds(tmp_path) == {'metadata.jsonl, line 1': lists.NO_CAPTION}
    assert not listing.read(tmp_path).captions
    (tmp_path / 'a.txt').write_text('beside it')
    assert listing.read(tmp_path).captions == {'a.png': ('beside it',)}


CSV_FAULTS = {
    'comma': ('ok.png,one, two', lists.BAD_LINE, '3 cells for 2 fields: put captions in double'),
    'open quote': ('ok.png,"one', lists.BAD_LINE, 'no separate cells'),
    'text after a quote': ('ok.png,"one" two', lists.BAD_LINE, 'no separate cells'),
    'one cell': ('ok.png', lists.NO_CAPTION, 'no text or caption'),
    'latin-1': ('ok.png,pi\udcf1ata', tree.NOT_UTF8, 'not UTF-8'),
    'gone': ('gone.png,one', listing.NO_IMAGE, 'no gone.png'),
    'folder': ('.,one', listing.NO_IMAGE, 'is the folder of its list'),
}


@pytest.mark.parametrize(('line', 'kind', 'reason'), CSV_FAULTS.values(), ids=CSV_FAULTS)
def test_bad_line_of_a_table_affects_no_other(tmp_path, line, kind, reason):
    for image in ('ok.png', 'next.png'):
        add(tmp_path, image)
    text = f'file_name,text\nok.png,fine\n{line}\nnext.png,"also\nfine"\n'
    (tmp_path / 'metadata.csv').write_bytes(text.encode('utf-8', 'surrogateescape'))
    found = listing.read(tmp_path)
    (fault,) = found.faults
    assert (fault.kind, fault.name) == (kind, 'metadata.csv, line 3') and reason in fault.reason
    assert found.captions == {'next.png': ('also\nfine',), 'ok.png': ('fine',)}


def test_repeated_names_of_an_object_are_records_each(tmp_path):
    add(tmp_path, 'a.png')
    (tmp_path / 'captions.json').write_text('{"a.png": "one", "a.png": "two"}')
    assert captions(tmp_path) == {'a.png': ('one', 'two')}


@pytest.mark.parametrize('end', ['\n', '\r\n', '\r'])
def test_line_ends_of_any_system_are_read(tmp_path, end):
    for image in ('a.png', 'b.png'):
        add(tmp_path, image)
    lines = [json.dumps({'file_name': name, 'text': name[0]}) for name in ('a.png', 'b.png')]
    (tmp_path / 'metadata.jsonl').write_text(end.join(lines), newline='')
    assert captions(tmp_path) == {'a.png': ('a',), 'b.png': ('b',)}


def test_spaces_around_cells_are_no_part_of_them(tmp_path):
    add(tmp_path, 'a.png')
    (tmp_path / 'metadata.csv').write_text('file_name , text\n a.png , "one, two"\n')
    assert captions(tmp_path) == {'a.png': ('one, two',)}


@pytest.mark.parametrize('name', ['a.txt', 'metadata.csv', 'metadata.jsonl'])
def test_zero_bytes_are_no_text(tmp_path, name):
    """UTF-16 without its mark is valid UTF-8, with a zero byte in every letter of ASCII."""
    add(tmp_path, 'a.png')
    text = {'a.txt': 'one'.encode('utf-16-le').decode()}
    text |= {'metadata.csv': 'file_name,text\na.png,o\0ne\n'}
    text |= {'metadata.jsonl': '{"file_name": "a.png", "text": "o\\u0000ne"}'}
    (tmp_path / name).write_text(text[name])
    assert tree.NOT_UTF8 in kinds(tmp_path).values() and not listing.read(tmp_path).captions


def test_list_with_another_name_is_reported(tmp_path):
    add(tmp_path, 'a.png', 'a')
    reported = ('labels.csv', 'train.jsonl', 'Metadata.ndjson', 'captions.xlsx')
    for name in (*reported, 'notes.json', 'notes.yaml'):
        (tmp_path / name).write_text('{}')
    assert kinds(tmp_path) == dict.fromkeys(reported, listing.OTHER_LIST)


@given(st.sampled_from(sorted(LISTS)), st.binary(max_size=80), st.data())
@settings(max_examples=80, deadline=None)
def test_any_damage_to_a_list_becomes_faults(tmp_path_factory, name, data, draw):
    root = tmp_path_factory.mktemp('any')
    content = bytearray(LISTS[name].encode())
    at = draw.draw(st.integers(0, len(content)))
    content[at:at] = data
    (root / name).write_bytes(content)
    assert all(fault.reason for fault in listing.read(root).faults)


# Captions.


@pytest.mark.parametrize(
    'blank', ['\u200b\u200b', '\ufeff', '\u2060 \u00ad', '\u3164', '\u2800', '\ufe0f', '\u00a0\t']
)
def test_captions_without_ink_are_empty(tmp_path, blank):
    add(tmp_path, 'a.png', blank)
    add(tmp_path, 'b.png')
    (tmp_path / 'metadata.jsonl').write_text(json.dumps({'image': 'b.png', 'text': blank}))
    assert set(kinds(tmp_path).values()) == {lists.EMPTY_CAPTION}
    assert len(kinds(tmp_path)) == 2


def test_separators_of_unicode_end_no_caption(tmp_path):
    add(tmp_path, 'a.png')
    (tmp_path / 'a.txt').write_text('one\u2028line\rtwo\x85\x0clines\r\n', newline='')
    assert captions(tmp_path) == {'a.png': ('one\u2028line', 'two\x85\x0clines')}


@pytest.mark.parametrize('text', ['\u732b', '\U0001f469\u200d\U0001f680', '?', '\u2764\ufe0f', '7'])
def test_short_captions_are_kept(tmp_path, text):
    add(tmp_path, 'a.png', text)
    assert captions(tmp_path) == {'a.png': (text,)}


def test_captions_beside_an_image(tmp_path):
    for name in ('a', 'b', 'c', 'd'):
        add(tmp_path, f'{name}.png')
    (tmp_path / 'a.caption').write_text('an a')
    (tmp_path / 'b.json').write_text('{"caption": "a b", "width": 16}')
    (tmp_path / 'c.txt').write_text('')
    (tmp_path / 'c.json').write_text('{"caption": "a c"}')
    (tmp_path / 'd.json').write_text('{"width": 16}')
    found = listing.read(tmp_path)
    assert found.captions == {'a.png': ('an a',), 'b.png': ('a b',), 'c.png': ('a c',)}
    assert [fault.name for fault in found.faults] == ['d.png']


# Names and links.


@pytest.mark.parametrize(('stored', 'listed'), [(COMPOSED, DECOMPOSED), (DECOMPOSED, COMPOSED)])
def test_names_are_found_in_the_other_normal_form(tmp_path, stored, listed):
    assert unicodedata.normalize('NFC', stored) == unicodedata.normalize('NFC', listed)
    add(tmp_path, f'{stored}/{stored}.png')
    add(tmp_path, f'{stored}2.png')
    (tmp_path / f'{listed}2.txt').write_text('a text file')
    record = {'file_name': f'{listed}/{listed}.png', 'text': 'a list'}
    (tmp_path / 'metadata.jsonl').write_text(json.dumps(record))
    assert set(captions(tmp_path).values()) == {('a text file',), ('a list',)}
    assert len(Folder(path=str(tmp_path), split='all').open(16)) == 2


def test_names_are_found_in_another_case_if_that_is_one_name(tmp_path):
    for name in ('a.JPG', 'b.png', 'B.PNG'):
        add(tmp_path, name)
    records = [{'file_name': name, 'text': name} for name in ('A.jpg', 'b.png', 'b.PNG', 'B.PNG')]
    (tmp_path / 'metadata.json').write_text(json.dumps(records))
    found = listing.read(tmp_path)
    expected = {'B.PNG': ('B.PNG',), 'a.JPG': ('A.jpg',), 'b.png': ('b.png',)}
    assert found.captions == expected and [f.reason for f in found.faults] == ['there is no b.PNG']


def test_both_normal_forms_are_two_images(tmp_path):
    for name in (COMPOSED, DECOMPOSED):
        add(tmp_path, f'{name}.png')
    records = [{'image': f'{name}.png', 'text': ascii(name)} for name in (COMPOSED, DECOMPOSED)]
    (tmp_path / 'metadata.json').write_text(json.dumps(records))
    expected = {f'{name}.png': (ascii(name),) for name in (COMPOSED, DECOMPOSED)}
    assert captions(tmp_path) == expected


def test_linked_folders_are_read_once(tmp_path):
    root = tmp_path / 'set'
    add(root, 'inside/a.png', 'a')
    add(tmp_path / 'outside', 'more/b.png', 'b')
    (root / 'again').symlink_to(root / 'inside')
    (root / 'loop').symlink_to(root)
    (root / 'one').symlink_to(tmp_path / 'outside')
    (root / 'two').symlink_to(tmp_path / 'outside' / 'more')
    (root / 'gone.png').symlink_to(tmp_path / 'nowhere')
    (root / 'self').symlink_to('self')
    found = listing.read(root)
    assert found.captions == {'inside/a.png': ('a',), 'one/more/b.png': ('b',)}
    names = ['again', 'gone.png', 'loop', 'self', 'two']
    assert [(f.kind, f.name) for f in found.faults] == [(tree.LINK, name) for name in names]


def test_link_to_a_folder_around_the_set_reads_no_image_twice(tmp_path):
    root = tmp_path / 'set'
    add(root, 'inside/a.png', 'a')
    (root / 'around').symlink_to('..')
    found = listing.read(root)
    assert found.captions == {'inside/a.png': ('a',)}
    assert [(f.kind, f.name) for f in found.faults] == [(tree.LINK, 'around/set')]


def test_pipes_and_devices_are_reported_and_not_opened(tmp_path):
    add(tmp_path, 'a.png', 'a')
    for name in ('b.png', 'c.csv', 'a.json'):
        os.mkfifo(tmp_path / name)
    (tmp_path / 'zero.png').symlink_to('/dev/zero')
    expected = dict.fromkeys(('b.png', 'c.csv', 'a.json'), tree.NOT_A_FILE)
    assert kinds(tmp_path) == expected | {'zero.png': tree.LINK}
    os.mkfifo(tmp_path / 'metadata.csv')
    with pytest.raises(UserError, match='metadata.csv is a pipe, expected a regular file'):
        listing.read(tmp_path)


# Containers.


def table(path: Path, count: int = 5, image: str = 'image', **options) -> None:
    """A Parquet file as Hugging Face datasets write it, of grey images."""
    images = [{'bytes': png(10 * row), 'path': f'{row}.png'} for row in range(count)]
    columns = {image: images, 'text': [f'grey {10 * row}' for row in range(count)]}
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table(columns), path, row_group_size=2, **options)


def shown(source) -> dict[str, int]:
    """Grey of the images by caption."""
    examples = [source[index] for index in range(len(source))]
    assert all((e['image'] == e['image'][0, 0, 0]).all() for e in examples)
    return {e['captions'][0]: int(e['image'][0, 0, 0]) for e in examples}


def test_parquet_sets_are_read(tmp_path):
    table(tmp_path / 'data.parquet')
    found = shown(Folder(path=str(tmp_path), split='all').open(16))
    assert found == {f'grey {grey}': grey for grey in range(0, 50, 10)}


def test_columns_of_bytes_and_other_captions_are_read(tmp_path):
    columns = {'JPG': [png(3), png(4)], 'prompt': [['three', 'drei'], ['four']]}
    parquet.write_table(pa.table(columns), tmp_path / 'a.parquet')
    source = Folder(path=str(tmp_path), split='all', caption='prompt').open(16)
    assert shown(source) == {'three': 3, 'four': 4} and source.captions(0) == ('three', 'drei')


@pytest.mark.parametrize('kind', [pa.binary(), pa.large_binary(), pa.binary_view(), None])
@pytest.mark.parametrize('is_dictionary', [False, True])
def test_bytes_of_any_type_are_images(tmp_path, kind, is_dictionary):
    images = [png(5), png(5)]
    column = pa.array(images, pa.binary(len(images[0])) if kind is None else kind)
    if is_dictionary:
        column = column.cast(pa.binary()).dictionary_encode()
    parquet.write_table(pa.table({'x': column, 'text': ['five', 'fünf']}), tmp_path / 'a.parquet')
    source = Folder(path=str(tmp_path), split='all').open(16)
    assert shown(source) == {'five': 5, 'fünf': 5}


def test_every_row_of_a_table_is_used_or_counted(tmp_path):
    images = [{'bytes': data, 'path': None} for data in (png(1), png(2), b'no image', None)]
    images.append(None)
    texts = ['one', None, 'broken', 'empty', 'null']
    parquet.write_table(pa.table({'image': images, 'text': texts}), tmp_path / 'a.parquet')
    source = Folder(path=str(tmp_path), split='all').open(16)
    assert shown(source) == {'one': 1}
    assert [fault.kind for fault in source.faults] == [
        lists.NO_CAPTION, *[image_files.UNREADABLE] * 3
    ]  # fmt: skip


def test_cell_that_is_not_utf8_affects_no_other_row(tmp_path):
    offsets, letters = np.arange(4, dtype=np.int32), b'x\xffz'
    texts = pa.StringArray.from_buffers(3, pa.py_buffer(offsets), pa.py_buffer(letters))
    parquet.write_table(pa.table({'image': [png(1)] * 3, 'text': texts}), tmp_path / 'a.parquet')
    found = listing.read(tmp_path)
    assert list(found.captions.values()) == [('x',), ('z',)]
    assert [(f.kind, f.name) for f in found.faults] == [(tree.NOT_UTF8, 'a.parquet/00000001')]


def test_damaged_tables_and_tables_without_images_are_reported(tmp_path):
    add(tmp_path, 'a.png', 'a')
    table(tmp_path / 'cut.parquet')
    data = (tmp_path / 'cut.parquet').read_bytes()
    (tmp_path / 'cut.parquet').write_bytes(data[:-9])
    parquet.write_table(pa.table({'url': ['x'], 'text': ['y']}), tmp_path / 'urls.parquet')
    assert kinds(tmp_path) == {
        'cut.parquet': image_files.UNREADABLE,
        'urls.parquet': tables.NO_IMAGES,
    }


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_any_damage_to_a_table_becomes_faults(tmp_path_factory, data):
    path = tmp_path_factory.mktemp('any') / 'a.parquet'
    table(path, compression='none')
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        Folder(path=str(path.parent), split='all').open(16)
    except UserError as error:
        assert str(error)


def test_shards_of_a_webdataset_are_read(tmp_path):
    members = {}
    for row in range(3):
        members |= {f'{row:05d}.png': png(row), f'{row:05d}.json': b'{"caption": "other"}'}
    members |= {f'{row:05d}.txt': f'grey {row}'.encode() for row in range(2)}
    members |= {'00003.json': b'{}', './._00000.png': b'', '00000.cls': b'7'}
    pack(tmp_path / 'shard-000.tar', members)
    parquet.write_table(pa.table({'url': ['x']}), tmp_path / 'shard-000.parquet')
    (tmp_path / 'shard-000_stats.json').write_text('{}')
    source = Folder(path=str(tmp_path), split='all').open(16)
    assert shown(source) == {'grey 0': 0, 'grey 1': 1, 'other': 2}
    assert [f.name for f in source.faults] == ['shard-000.tar/00003.json']


def test_archive_with_a_list_is_read_like_a_folder(tmp_path):
    lines = {'a/b.png': png(7), 'metadata.csv': b'file_name,text\na/b.png,seven\n'}
    pack(tmp_path / 'set.tar', lines)
    assert captions(tmp_path) == {'set.tar/a/b.png': ('seven',)}


def test_damaged_and_packed_archives_are_reported(tmp_path):
    pack(tmp_path / 'cut.tar', {'a.png': png(1), 'a.txt': b'one', 'b.png': png(2), 'b.txt': b'two'})
    data = (tmp_path / 'cut.tar').read_bytes()
    (tmp_path / 'cut.tar').write_bytes(data[: data.index(b'b.png') + 550])
    packed = ('set.zip', 'a.TAR.GZ', 'b.txz', 'c.tar.lz4', 'd.tbz2', 'e.tar.Z')
    containers = ('data.arrow', 'data.lmdb', 'data.pkl', 'data.npy')
    for name in (*packed, *containers):
        (tmp_path / name).write_bytes(b'PK')
    found = listing.read(tmp_path)
    assert found.captions == {'cut.tar/a.png': ('one',)}
    assert {f.name: f.kind for f in found.faults} == {
        'cut.tar': image_files.UNREADABLE,
        **dict.fromkeys(packed, tree.NOT_UNPACKED),
        **dict.fromkeys(containers, listing.OTHER_CONTAINER),
    }


def test_names_in_an_archive_that_cannot_be_files_are_reported(tmp_path):
    with tarfile.open(tmp_path / 'set.tar', 'w') as archive:
        for name, data in (
            ('../out.png', png(1)),
            ('a.png', png(1)),
            ('a.txt', b'one'),
            ('./a.png', png(2)),
            ('.hidden.png', png(3)),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    source = Folder(path=str(tmp_path), split='all').open(16)
    assert shown(source) == {'one': 2}
    assert {fault.name: fault.kind for fault in source.faults} == {
        'set.tar/../out.png': tree.OUTSIDE,
        'set.tar/a.png': tree.TWICE,
    }


def test_links_and_pipes_in_an_archive_are_reported(tmp_path):
    pack(tmp_path / 'set.tar', {'a.png': png(1), 'a.txt': b'one'})
    others = {'hard.png': tarfile.LNKTYPE, 'soft.png': tarfile.SYMTYPE, 'pipe': tarfile.FIFOTYPE}
    with tarfile.open(tmp_path / 'set.tar', 'a') as archive:
        for name, kind in (others | {'folder': tarfile.DIRTYPE}).items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, 'a.png'
            archive.addfile(member)
    found = listing.read(tmp_path)
    assert found.captions == {'set.tar/a.png': ('one',)}
    assert {f.name: f.kind for f in found.faults} == {
        'set.tar/hard.png': tree.LINK,
        'set.tar/pipe': tree.NOT_A_FILE,
        'set.tar/soft.png': tree.LINK,
    }


def test_container_that_changes_is_refused(tmp_path):
    table(tmp_path / 'a.parquet')
    source = Folder(path=str(tmp_path), split='all').open(16)
    table(tmp_path / 'a.parquet', 6)
    with pytest.raises(UserError, match='a.parquet/00000000 has vanished or changed'):
        source[0]


# Formats of images.


@pytest.mark.parametrize(
    ('name', 'kind'),
    [
        ('a.jfif', 'JPEG'),
        ('a.JPE', 'JPEG'),
        ('a.avif', 'AVIF'),
        ('a.apng', 'PNG'),
        ('a.pgm', 'PPM'),
    ],
)
def test_further_suffixes_are_images(tmp_path, name, kind):
    Image.new('L', (16, 16), 90).save(tmp_path / name, kind)
    (tmp_path / 'a.txt').write_text('grey')
    (image,) = (example['image'] for example in Folder(path=str(tmp_path), split='all').open(16))
    np.testing.assert_allclose(image, 90, atol=2)


@pytest.mark.parametrize('name', ['a.png', 'a.tif'])
def test_16_bit_grey_is_scaled_to_eight_bits(tmp_path, name):
    grey = np.full((16, 16), 40_000, np.uint16)
    Image.fromarray(grey).save(tmp_path / name)
    (tmp_path / 'a.txt').write_text('grey')
    source = Folder(path=str(tmp_path), split='all').open(16)
    np.testing.assert_array_equal(source[0]['image'], 40_000 >> 8)


def test_transparent_value_of_16_bit_grey_becomes_white(tmp_path):
    grey = np.full((16, 16), 40_000, np.uint16)
    grey[:, 8:] = 1_000
    Image.fromarray(grey).save(tmp_path / 'a.png', transparency=1_000)
    (tmp_path / 'a.txt').write_text('half')
    image = Folder(path=str(tmp_path), split='all').open(16)[0]['image']
    assert (image[:, :8] == 40_000 >> 8).all() and (image[:, 8:] == 255).all()


# Splits.

LAYOUTS = {
    'hugging face': ({'train': 5, 'validation': 3, 'test': 2}, (5, 3, 2)),
    'short': ({'Training': 4, 'VAL': 2}, (4, 2, 0)),
    'dev': ({'train': 3, 'dev': 2, 'eval': 1}, (3, 2, 1)),
    'beside': ({'.': 2, 'cats': 1, 'valid': 1}, (3, 1, 0)),
    'years': ({'train2017': 3, 'val2017': 2, 'test2017': 1}, (3, 2, 1)),
    'test alone': ({'.': 4, 'test': 3}, (4, 0, 3)),
}


def fill(root: Path, folders: dict[str, int]) -> None:
    for folder, count in folders.items():
        for number in range(count):
            add(root, f'{folder}/{number}.png', f'{folder} {number}')


@pytest.mark.parametrize(('folders', 'counts'), LAYOUTS.values(), ids=LAYOUTS)
def test_folders_are_splits(tmp_path, capsys, folders, counts):
    """No split shares an image with another, and the prepared set has the same ones."""
    fill(tmp_path / 'mine', folders)
    expected = {name: n for name, n in zip(splits.SPLITS, counts, strict=True) if n}
    names = {}
    for split in expected:
        source = Folder(path=str(tmp_path / 'mine'), split=split, held_out=0.5).open(16)
        names[split] = {entry.name for entry in source.entries}
    assert {split: len(images) for split, images in names.items()} == expected
    assert len(set.union(*names.values())) == sum(counts)
    everything = Folder(path=str(tmp_path / 'mine'), split='all').open(16)
    assert len(everything) == counts[0] + counts[1]  # never those for tests
    words = ['data', 'prepare', 'folder', str(tmp_path / 'mine'), str(tmp_path / 'set')]
    assert cli.main([*words, '--size', '16']) == 0
    text = ', '.join(f'{split} {count}' for split, count in expected.items())
    assert f'{text} images' in capsys.readouterr().out


def in_lines(root: Path, fields: list[dict[str, str]]) -> None:
    for number in range(len(fields)):
        add(root, f'{number}.png')
    records = [
        {'file_name': f'{n}.png', 'text': f'image {n}'} | more for n, more in enumerate(fields)
    ]
    (root / 'metadata.jsonl').write_text('\n'.join(map(json.dumps, records)))


def in_cells(root: Path, fields: list[dict[str, str]]) -> None:
    for number in range(len(fields)):
        add(root, f'{number}.png')
    rows = [f'{n}.png,image {n},{more.get("split", "")}' for n, more in enumerate(fields)]
    (root / 'metadata.csv').write_text('\n'.join(['file_name,text,split', *rows]))


def in_table(root: Path, fields: list[dict[str, str]]) -> None:
    columns = {
        'image': [png() for _ in fields],
        'text': [f'image {number}' for number in range(len(fields))],
        'split': [more.get('split') for more in fields],
    }
    parquet.write_table(pa.table(columns), root / 'data.parquet')


def beside(root: Path, fields: list[dict[str, str]]) -> None:
    for number, more in enumerate(fields):
        add(root, f'{number}.png')
        (root / f'{number}.json').write_text(json.dumps({'caption': f'image {number}'} | more))


@pytest.mark.parametrize('write', [in_lines, in_cells, in_table, beside])
def test_records_name_splits(tmp_path, write):
    names = ('train', 'TEST', 'val2014', 'restval', 'test2015')
    write(tmp_path, [{'split': name} for name in names] + [{}])
    found = {
        split: [caption[-1] for caption in shown(Folder(path=str(tmp_path), split=split).open(16))]
        for split in (*splits.SPLITS, 'all')
    }
    assert found == {
        'train': ['0', '3', '5'],
        'validation': ['2'],
        'test': ['1', '4'],
        'all': ['0', '2', '3', '5'],
    }
    assert Folder(path=str(tmp_path)).has_test_images()


def test_image_of_two_splits_is_not_trained_on(tmp_path):
    add(tmp_path, 'a.png')
    add(tmp_path, 'b.png')
    rows = 'a.png,one,train\na.png,two,test\nb.png,three,train\n'
    (tmp_path / 'metadata.csv').write_text(f'file_name,text,split\n{rows}')
    assert [e.name for e in Folder(path=str(tmp_path)).open(16).entries] == ['b.png']


def test_image_that_folder_or_record_calls_a_test_is_not_trained_on(tmp_path):
    for name in ('test/a.png', 'train/b.png', 'c.png'):
        add(tmp_path, name)
    rows = 'test/a.png,one,train\ntrain/b.png,two,test\nc.png,three,train\n'
    (tmp_path / 'metadata.csv').write_text(f'file_name,text,split\n{rows}')
    assert [e.name for e in Folder(path=str(tmp_path)).open(16).entries] == ['c.png']


def test_folders_further_below_are_no_splits(tmp_path):
    fill(tmp_path, {'cats/test': 6, 'dogs/val': 6, 'testing ground': 6})
    for split in ('train', 'validation'):
        assert len(Folder(path=str(tmp_path), split=split, held_out=0.4).open(16))
    with pytest.raises(UserError, match="no split 'test' with 18 usable"):
        Folder(path=str(tmp_path), split='test').open(16)


def test_containers_are_splits(tmp_path):
    table(tmp_path / 'data' / 'train-00000-of-00001.parquet', 5)
    table(tmp_path / 'data' / 'test-00000-of-00001.parquet', 2)
    pack(tmp_path / 'val_0.tar', {'a.png': png(), 'a.txt': b'a'})
    pack(tmp_path / 'more.tar', {'test/b.png': png(), 'test/b.txt': b'b'})
    pack(tmp_path / 'default' / 'train' / '0.tar', {'c.png': png(), 'c.txt': b'c'})
    pack(tmp_path / 'testify.tar', {'d.png': png(), 'd.txt': b'd'})
    found = {
        split: len(Folder(path=str(tmp_path), split=split).open(16)) for split in splits.SPLITS
    }
    assert found == {'train': 7, 'validation': 1, 'test': 3}


def test_validation_without_a_folder_is_the_test_split(tmp_path, caplog):
    fill(tmp_path, {'train': 4, 'test': 3})
    source = Folder(path=str(tmp_path), split='validation').open(16)
    assert {entry.name.partition('/')[0] for entry in source.entries} == {'test'}
    assert 'no validation images: its test images' in caplog.text


def test_missing_split_is_refused_with_the_counts(tmp_path):
    fill(tmp_path, {'train': 4})
    with pytest.raises(UserError, match='train 4: add a folder validation, or give the folder of'):
        Folder(path=str(tmp_path), split='validation').open(16)
    assert len(Folder(path=str(tmp_path / 'train'), split='validation').open(16))
    fill(tmp_path, {'val': 3})
    message = "no usable images of the split 'test', only train 4, validation 3: add"
    with pytest.raises(UserError, match=message):
        Folder(path=str(tmp_path), split='test').open(16)


@pytest.mark.parametrize('run', [tiny.STAR, tiny.TOKENIZER])
def test_test_images_are_never_trained_on(run):
    with pytest.raises(ValueError, match="data.split is 'test', whose images are never trained on"):
        dataclasses.replace(run, data=Folder(path='mine', split='test'))


def test_evaluation_uses_the_test_split_by_default(tmp_path):
    fill(tmp_path / 'a', {'train': 4, 'val': 3, 'test': 2})
    fill(tmp_path / 'b', {'train': 4, 'val': 3})
    for name, split, count in (('a', 'test', 2), ('b', 'validation', 3)):
        (group,) = groups.load_groups(str(tmp_path / name), (), 10, 16)
        assert group.split == split and len(group.source) == count
    assert cli.main(
        ['data', 'prepare', 'folder', str(tmp_path / 'a'), str(tmp_path / 'set'), '--size', '16']
    ) == 0  # fmt: skip
    (group,) = groups.load_groups(str(tmp_path / 'set'), (), 10, 16)
    assert group.split == 'test' and len(group.source) == 2
