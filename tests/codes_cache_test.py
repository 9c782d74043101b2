"""Does training from a cache equal training from images, and are other caches refused?"""

import dataclasses
import functools
import itertools
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from star_jax import cli, image_io
from star_jax.checkpoint import folder
from star_jax.data import encoded
from star_jax.data.crops import RandomCrops, TenCrops
from star_jax.data.folder import Folder
from star_jax.data.resizing import HalvedBicubic
from star_jax.data.shapes import Shapes
from star_jax.errors import UserError
from star_jax.losses import tokens
from star_jax.text.cache import FeatureCache
from star_jax.text.encoder import TextEncoder
from star_jax.text.encoder import load as load_text
from star_jax.tokenizers.residual_vq import VQ
from star_jax.training import cache, train
from star_jax.training.run import Run
from star_jax.training.state import TrainState
from star_jax.training.transformer_job import TransformerJob

ROW = jax.ShapeDtypeStruct((3,), np.int32)
SHARD = 10  # examples: the tiny set then has five shards, the last one short


@pytest.fixture(scope='module', autouse=True)
def surroundings(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('STAR_JAX_CACHE', str(tmp_path_factory.mktemp('cache')))
        patch.setattr(encoded, 'SHARD', SHARD)
        yield


@pytest.fixture(scope='module')
def run(tmp_path_factory) -> Run:
    place = tiny.write_tokenizer(tmp_path_factory.mktemp('tokenizer') / 'model')
    return dataclasses.replace(tiny.STAR, tokenizer=place, data=Shapes(count=48, phrasings=2))


@pytest.fixture(scope='module')
def images(run) -> TransformerJob:
    return TransformerJob(run)


@pytest.fixture(scope='module')
def made(run, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp('sets') / 'shapes.codes'
    assert train.cache(dataclasses.replace(run, cache=str(place))) == place
    return place


@pytest.fixture
def place(made, tmp_path) -> Path:
    """A copy that a test may damage: a cache can be moved."""
    return Path(shutil.copytree(made, tmp_path / 'moved.codes'))


def job(run: Run, place: Path, **changes) -> TransformerJob:
    return TransformerJob(dataclasses.replace(run, cache=str(place), **changes))


def losses(job: TransformerJob, state: TrainState, steps: int) -> list[float]:
    state, found = jax.tree.map(jnp.copy, state), []  # a step donates its own
    for step, batch in enumerate(itertools.islice(job.batches(0), steps)):
        state, metrics = job.step(step, state, batch)
        found.append(float(metrics['loss']))
    return found


def test_cache_holds_the_codes_of_the_tokenizer(run, images, made):
    cached = job(run, made)
    encode = jax.jit(functools.partial(tokens.encode, images.program.tokenizer))
    for name in ('data', 'validation'):
        coded = cached.source if name == 'data' else cached.validation
        source = images.images[name]
        assert len(coded) == len(source)
        shown = np.stack([source[n]['image'] for n in range(len(source))])
        wanted = encode(images.tokenizer.params, shown)
        found = np.stack([coded[n]['encoded'] for n in range(len(source))])
        assert found.dtype == np.int32 and found.max() > 0
        np.testing.assert_array_equal(found, wanted)
        assert all(coded[n]['captions'] == source[n]['captions'] for n in range(len(source)))
    assert sorted(file.dtype for file in cached.source.shards) == [np.uint8] * 5


def test_training_from_a_cache_equals_training_from_images(run, images, made, monkeypatch):
    """It covers more than an epoch, random and dropped captions, and the validation set."""
    cached, state = job(run, made), images.init()
    with monkeypatch.context() as patch:
        for kind in (TransformerJob, TextEncoder):
            patch.setattr(kind, 'encode', lambda *_: pytest.fail('a cached run encodes nothing'))
        found, scores = losses(cached, state, 8), cached.evaluate(state)
    assert found == losses(images, state, 8)
    assert scores == images.evaluate(state)


def test_cache_serves_other_models_and_settings(run, made):
    """Only what codes and features depend on is compared."""
    wider = dataclasses.replace(run.model, mlp_ratio=2.0)
    served = job(run, made, model=wider, batch=16, seed=5, caption_drop=0.5)
    assert len(next(iter(served.batches(0)))[0].encoded) == 16


def test_text_features_are_copied_from_the_users_cache(run, made, tmp_path, monkeypatch):
    known = FeatureCache(load_text(run.text), made)
    captions = ['a red circle', 'a blue square']
    known.warm(captions)
    other = FeatureCache(known.encoder, tmp_path)
    monkeypatch.setattr(TextEncoder, 'encode', lambda *_: pytest.fail('encoded again'))
    other.warm(captions, other=known)
    jax.tree.map(np.testing.assert_array_equal, other.features(captions), known.features(captions))


def test_cache_refuses_another_tokenizer(run, made, tmp_path):
    params = jax.tree.map(np.copy, tiny.tokenizer_params())
    params['quantiser']['codebook'][0] += 1e-3
    folder.write(
        tmp_path / 'other', folder.StoredTokenizer(config=tiny.TOKENIZER.model, params=params)
    )
    with pytest.raises(UserError, match=r'another run \(tokenizer: .*star-jax data cache'):
        job(run, made, tokenizer=str(tmp_path / 'other'))


def test_cache_refuses_other_scales(run, made):
    with pytest.raises(UserError, match=r'another run \(grids: '):
        job(run, made, model=dataclasses.replace(run.model, sides=(1, 3, 4)))


def test_cache_refuses_another_text_encoder(run, made, tmp_path):
    other = Path(shutil.copytree(run.text, tmp_path / 'other'))
    words = (other / 'config.json').read_text()
    assert '1e-06' in words
    (other / 'config.json').write_text(words.replace('1e-06', '1e-05'))
    with pytest.raises(UserError, match=r'another run \(text: '):
        job(run, made, text=str(other))


@pytest.mark.parametrize(
    ('field', 'change', 'named'),
    [
        ('data', {'count': 49}, r'data.count: 48 -> 49; .*examples: 48 -> 49'),
        ('data', {'phrasings': 1}, r'data.phrasings: 2 -> 1'),
        ('validation', {'split': 'held_out'}, r'validation.split: '),
    ],
)
def test_cache_refuses_another_set(run, made, field, change, named):
    with pytest.raises(UserError, match=named):
        job(run, made, **{field: dataclasses.replace(getattr(run, field), **change)})


def test_cache_refuses_shapes_rendered_differently(run, made, monkeypatch):
    from star_jax.data import shapes

    monkeypatch.setattr(shapes, 'RING_HOLE', 0.4)
    with pytest.raises(UserError, match=r'another run \(images: '):
        job(run, made)


def test_missing_or_incomplete_cache_is_refused(run, place, tmp_path):
    with pytest.raises(UserError, match='holds no encoded images.*star-jax data cache'):
        job(run, tmp_path / 'nothing')
    next((place / 'data').glob('00003-*.npy')).unlink()
    with pytest.raises(UserError, match='incomplete, shard 3 is missing'):
        job(run, place)


@pytest.mark.parametrize('damage', ['cut', 'flip'])
def test_damaged_shard_is_refused_and_written_again(run, made, place, damage):
    shard = next((place / 'data').glob('00002-*.npy'))
    data = bytearray(shard.read_bytes())
    if damage == 'cut':
        data = data[:-1]
    else:
        data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match=f'{shard.name} is damaged'):
        job(run, place)
    train.cache(dataclasses.replace(run, cache=str(place)))
    assert shards(place) == shards(made)


def test_interrupted_cache_continues_after_the_last_shard(tmp_path):
    """Interrupted at any block, it counts as incomplete, and the same call completes it."""
    count, key = 48, {'made': 'by a test', 'examples': 48}
    rows = np.arange(count * 3, dtype=np.int32).reshape(count, 3)
    asked = []

    def encode(first: int, stop: int = count):
        asked.append(first)
        for start in range(first, count, 7):
            if start >= stop:
                raise KeyboardInterrupt
            yield rows[start : start + 7]

    for stop in (14, 21, 40):
        with pytest.raises(KeyboardInterrupt):
            encoded.write(
                tmp_path / 'data', key, count, lambda first, stop=stop: encode(first, stop)
            )
        with pytest.raises(UserError, match='incomplete'):
            encoded.read(tmp_path / 'data', key, range(count), ROW)
    encoded.write(tmp_path / 'data', key, count, encode)
    assert asked == [0, 10, 20, 40]
    whole = encoded.read(tmp_path / 'data', key, range(count), ROW)
    np.testing.assert_array_equal(np.concatenate(whole.shards), rows)
    encoded.write(tmp_path / 'data', key, count, lambda first: pytest.fail('it was whole'))

    encoded.write(tmp_path / 'data', key | {'made': 'otherwise'}, count, lambda _: [rows + 1])
    other = encoded.read(tmp_path / 'data', key | {'made': 'otherwise'}, range(count), ROW)
    np.testing.assert_array_equal(np.concatenate(other.shards), rows + 1)


@pytest.fixture
def four_shards(tmp_path) -> tuple[Path, np.ndarray]:
    """A folder of 40 encoded images in four shards, and the images."""
    rows = np.arange(120, dtype=np.int32).reshape(40, 3)
    encoded.write(tmp_path / 'cache' / 'data', {}, 40, lambda first: [rows[first:]])
    return tmp_path / 'cache', rows


def flip(path: Path, position: int) -> None:
    """Changes one byte of a file."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_opening_reads_a_sample_and_maps_shards_at_use(four_shards, monkeypatch):
    folder, rows = four_shards
    monkeypatch.setattr(encoded, 'SAMPLED', 2)
    monkeypatch.setattr(encoded.weights, 'sha256', lambda _: pytest.fail('read a whole shard'))
    read, mapped = [], []
    is_intact, map_shard = encoded._Shard.is_block_intact, encoded._Shard.map
    monkeypatch.setattr(
        encoded._Shard, 'is_block_intact', lambda *args: read.append(args) or is_intact(*args)
    )
    monkeypatch.setattr(encoded._Shard, 'map', lambda s: mapped.append(s) or map_shard(s))
    source = encoded.read(folder / 'data', {}, Captions(40), ROW)
    assert len(read) == 2 and not mapped
    for index in (31, 39, 5, 32):
        np.testing.assert_array_equal(source[index]['encoded'], rows[index])
    assert [shard.path.name[:5] for shard in mapped] == ['00003', '00000']
    monkeypatch.setattr(encoded, 'MAX_MAPPED', 1)
    few = encoded.read(folder / 'data', {}, Captions(40), ROW)
    np.testing.assert_array_equal(np.concatenate(few.shards), rows)


class Captions(Sequence[str]):
    """A source of captions."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> str:
        return str(index)

    def captions(self, index: int) -> tuple[str]:
        return (str(index),)


def test_check_finds_and_removes_damaged_files(four_shards, monkeypatch, capsys):
    """Damage outside of the sample, which no opening finds, is found and made again alone."""
    folder, rows = four_shards
    monkeypatch.setattr(encoded, 'SAMPLED', 2)  # blocks of the first and the last shard
    assert cli.main(['data', 'check', str(folder)]) == 0
    assert '4 files, 0.0 GB, all intact' in capsys.readouterr().out
    before = sorted(path.name for path in (folder / 'data').iterdir())
    flip(next((folder / 'data').glob('00001-*')), -20)
    encoded.read(folder / 'data', {}, Captions(40), ROW)
    assert cli.main(['data', 'check', str(folder)]) == 2
    assert '1 of 4 files' in (error := capsys.readouterr().err) and 'data/00001-' in error
    assert cli.main(['data', 'check', str(folder), '--remove']) == 2
    with pytest.raises(UserError, match='incomplete, shard 1 is missing'):
        encoded.read(folder / 'data', {}, Captions(40), ROW)
    asked = []
    encoded.write(folder / 'data', {}, 40, lambda first: asked.append(first) or [rows[first:]])
    assert asked == [10] and before == sorted(path.name for path in (folder / 'data').iterdir())
    assert cli.main(['data', 'check', str(folder.parent)]) == 2
    assert 'holds no encoded images or features' in capsys.readouterr().err


def test_pipes_among_shards_are_damaged_and_replaced(four_shards, capsys):
    """Reading a pipe would wait for ever."""
    folder, rows = four_shards
    (shard,) = (folder / 'data').glob('00002-*')
    shard.unlink()
    os.mkfifo(shard)
    with pytest.raises(UserError, match='is a pipe'):
        encoded.read(folder / 'data', {}, Captions(40), ROW)
    assert cli.main(['data', 'check', str(folder)]) == 2
    assert '1 of 4 files' in capsys.readouterr().err
    encoded.write(folder / 'data', {}, 40, lambda first: [rows[first:]])
    assert shard.is_file() and cli.main(['data', 'check', str(folder)]) == 0


def test_check_reads_text_features(run, made, tmp_path, capsys):
    place = Path(shutil.copytree(made, tmp_path / 'copy'))
    segment = next((place / 'text').glob('*/*.safetensors'))
    assert cache.check(place).damaged == ()
    flip(segment, -1)
    assert cache.check(place).damaged == (segment,)


def test_killed_writes_leave_nothing_after_the_next_one(tmp_path):
    """Other temporary files stay: those of a running process, and those of other kinds."""
    folder = tmp_path / 'data'
    folder.mkdir()
    (folder / 'key.json').write_text('{}')
    left = folder / '.00000-abc.npy.0123abcd'
    left.touch()
    encoded.write(folder, {}, 1, lambda _: [np.zeros((1, 3), np.int32)])
    assert sorted(path.suffix for path in folder.iterdir()) == ['.json', '.npy']


def test_folder_of_other_files_is_not_overwritten(tmp_path):
    (tmp_path / 'thesis.txt').write_text('years of work')
    with pytest.raises(UserError, match='something else than encoded images'):
        encoded.write(tmp_path, {'examples': 1}, 1, lambda _: [np.zeros((1, 3), np.int32)])
    assert (tmp_path / 'thesis.txt').exists()


def test_fingerprint_changes_with_the_images_of_a_folder(tmp_path):
    def fingerprint() -> str:
        return Folder(path=str(tmp_path), split='all').open(16).fingerprint()

    colours = np.random.default_rng(0).integers(0, 256, (20, 3), dtype=np.uint8)
    for number, colour in enumerate(colours):
        image = np.broadcast_to(colour, (16, 16, 3))
        image_io.save_png(image, tmp_path / f'{number}.png')
        (tmp_path / f'{number}.txt').write_text(f'colour {number}')
    seen = [fingerprint()]
    assert fingerprint() == seen[0]
    (tmp_path / '7.txt').write_text('another colour')
    seen.append(fingerprint())
    os.utime(tmp_path / '11.png', ns=(1, 1))
    seen.append(fingerprint())
    (tmp_path / '5.png').unlink()
    seen.append(fingerprint())
    assert len(set(seen)) == 4


def test_key_changes_with_the_way_of_resizing(tmp_path):
    image_io.save_png(np.full((16, 16, 3), 7, np.uint8), tmp_path / 'a.png')
    (tmp_path / 'a.txt').write_text('equal in either way')

    def key(data: Folder) -> encoded.Key:
        run = dataclasses.replace(tiny.STAR, data=data)
        tokenizer = SimpleNamespace(config=VQ(), params={})
        encoder = SimpleNamespace(identity='that of a text encoder')
        origin = cache.Origin(run=run, tokenizer=tokenizer, prompt_encoder=encoder)
        return origin.key('data', data.open(16))

    lanczos = Folder(path=str(tmp_path), split='all')
    halved = dataclasses.replace(lanczos, resizing=HalvedBicubic())
    assert key(halved)['images'] == key(lanczos)['images'] and key(halved) != key(lanczos)
    assert 'resizing' not in key(lanczos)['data']  # caches from before this choice stay valid


def test_cache_path_is_beside_its_set(run, tmp_path):
    beside = dataclasses.replace(run, data=Folder(path=str(tmp_path)))
    assert cache.cache_path(beside) == tmp_path.with_name(f'{tmp_path.name}.codes')
    embedded = cache.cache_path(run)
    assert embedded.is_relative_to(os.environ['STAR_JAX_CACHE'])
    assert embedded != cache.cache_path(dataclasses.replace(run, tokenizer='shipped'))
    assert cache.cache_path(dataclasses.replace(run, cache='here')) == Path('here')


def shards(place: Path) -> list[str]:
    return sorted(path.name for path in (place / 'data').iterdir())


def test_cache_refuses_random_crops(run, tmp_path):
    enlarged = dataclasses.replace(run, crops=RandomCrops(enlarge=1.5))
    with pytest.raises(UserError, match='enlarge 1.5 crops an image anew'):
        train.cache(enlarged)
    with pytest.raises(ValueError, match='leave out one of the two'):
        dataclasses.replace(enlarged, cache=str(tmp_path))


def test_training_crops_images_and_validation_does_not(run):
    job = TransformerJob(dataclasses.replace(run, crops=RandomCrops(enlarge=1.5)))
    side, _ = job.program.tokenizer.resolution
    assert job.source[0]['image'].shape[0] == round(1.5 * side)
    assert job.validation[0]['image'].shape[0] == side
    assert next(job.batches(0))[0].encoded.shape == (run.batch, job.program.network.schedule.length)


def test_ten_crops_from_a_cache_are_those_of_live_encoding(run, tmp_path):
    live = dataclasses.replace(run, crops=TenCrops(enlarge=1.5))
    cached = dataclasses.replace(live, cache=str(tmp_path))
    assert train.cache(cached) == tmp_path
    job, expected = TransformerJob(cached), TransformerJob(live)
    length = job.program.network.schedule.length
    assert job.source[0]['encoded'].shape == (10, length)
    assert job.validation[0]['encoded'].shape == (length,)
    ours, theirs = job.batches(0), expected.batches(0)
    for _ in range(2):
        (one,), (other,) = next(ours), next(theirs)
        np.testing.assert_array_equal(one.encoded, other.encoded)
    with pytest.raises(UserError, match='was made for another run'):
        TransformerJob(dataclasses.replace(cached, crops=TenCrops(enlarge=1.25)))
    with pytest.raises(ValueError, match='ten crops are parts of an enlarged image'):
        TenCrops(enlarge=1.0)
