"""Does a pipeline give the same images in every batch and on every mesh?"""

import collections
import dataclasses
import json
import operator
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from PIL import Image

import star_jax
from star_jax import cli, image_io
from star_jax.core import pixels
from star_jax.core.settings import Settings, StableSettings
from star_jax.data.folder import Folder
from star_jax.data.prepared import Prepared
from star_jax.data.shapes import Shapes
from star_jax.errors import UserError
from star_jax.evaluation.eval_context import EvalOptions
from star_jax.families.star import Star
from star_jax.nn.attention_dispatch import Automatic
from star_jax.nn.bind import bind
from star_jax.parallel.mesh import MeshShape
from star_jax.sampling import program
from star_jax.sampling.pipeline import Pipeline, batches
from star_jax.tokenizers.autoencoder import Autoencoder
from star_jax.training.optimizer import AdamW
from star_jax.training.run import Pace, Run, TokenizerRun
from star_jax.training.schedules import LearningRate

# In another batch the decoder rounds differently, by about 1e-4 of a level of gray. No pixel of the
# images of this seed is within 1e-3 of a boundary between levels: bytes are equal on any machine.
SEED = 339
BLACK = np.zeros((16, 16, 3), np.uint8)
PROMPTS = ['a red circle', 'a small blue star', 'a green ring', 'two crosses', 'a cat']


class Words(collections.abc.Sequence):
    """A sequence without slices."""

    def __init__(self, words: list[str]) -> None:
        self.words = words

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, index: int) -> str:
        return self.words[operator.index(index)]


def closed_image() -> Image.Image:
    image = Image.new('RGB', (9, 9))
    image.close()
    return image


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> str:
    return tiny.write_model(tmp_path_factory.mktemp('pipe') / 'model')


@pytest.fixture(scope='module')
def pipe(folder) -> Pipeline:
    return star_jax.load(folder)


@pytest.fixture(scope='module')
def images(pipe) -> np.ndarray:
    return pipe(PROMPTS, seed=SEED, guidance=2.0, top_k=8, top_p=0.8)


def test_attention_is_computed_as_the_devices_of_the_mesh_do(pipe, monkeypatch):
    """A mesh of CPUs on a machine whose default devices are GPUs selects no kernel of GPUs."""
    platforms, choose = set(), Automatic.choose
    monkeypatch.setattr(
        Automatic,
        'choose',
        lambda self, *args: platforms.add(self.platform) or choose(self, *args),
    )
    config = pipe._config
    inputs, condition = config.abstract_inputs(), config.abstract_condition()
    jax.eval_shape(pipe.network.init, jax.random.key(0), inputs, condition)
    assert platforms == {'cpu'}


def test_images_are_bytes_and_differ(images):
    assert images.shape == (5, 16, 16, 3) and images.dtype == np.uint8
    assert all((images[0] != image).any() for image in images[1:])


def test_image_does_not_depend_on_the_batch(pipe, images):
    again = pipe(PROMPTS, seed=SEED, batch=2, guidance=2.0, top_k=8, top_p=0.8)  # 2, 2 and 1 images
    np.testing.assert_array_equal(again, images)


def test_exact_image_alone_is_the_same_in_bfloat16(folder):
    pipe = star_jax.load(folder, dtype='bfloat16')
    exact = {'batch': 4, 'exact': True, 'guidance': 2.0, 'top_k': 8, 'top_p': 0.8}
    images = pipe(PROMPTS, seed=SEED, **exact)  # batches of 4 and 4, of which 3 rows are padding
    alone = [pipe([prompt], seed=SEED + i, **exact) for i, prompt in enumerate(PROMPTS)]
    np.testing.assert_array_equal(np.concatenate(alone), images)
    back = pipe(PROMPTS[::-1], seed=[SEED + i for i in range(4, -1, -1)], **exact)
    np.testing.assert_array_equal(back[::-1], images)


def test_exact_images_record_their_batch(folder, tmp_path, capsys):
    """An interrupted command cannot continue with another batch, which gives other images."""
    command = ['sample', PROMPTS[0], '--model', folder, '--out', str(tmp_path), '--batch', '2']
    assert cli.main([*command, '--exact']) == 0
    record = json.loads((tmp_path / 'samples.jsonl').read_text())
    assert record['batch'] == 2 and record['prompt'] == PROMPTS[0]
    for others in ([], ['--exact', '--batch', '4']):
        assert cli.main([*command, *others]) == 2
        assert 'its batch was' in capsys.readouterr().err


def test_command_records_the_images_that_it_starts_from(folder, images, tmp_path, capsys):
    wide = np.concatenate([images[0], images[1]], axis=1)
    image_io.save_png(wide, tmp_path / 'wide.png')
    command = ['sample', PROMPTS[0], '--model', folder, '--out', str(tmp_path / 'out')]
    command += ['--image', str(tmp_path / 'wide.png'), '--keep']
    assert cli.main([*command, '3']) == 0
    assert 'wide.png: the centre of 32 x 16 px becomes 16 x 16 px' in capsys.readouterr().out
    record = json.loads((tmp_path / 'out' / 'samples.jsonl').read_text())
    assert record['keep'] == 3 and record['image']['source'].endswith('wide.png')
    assert cli.main([*command, '2']) == 2
    assert "its keep was '3' and would be '2'" in capsys.readouterr().err


def test_shares_of_a_command_start_from_the_image_of_each_prompt(
    folder, pipe, images, tmp_path, capsys
):
    paths = [str(image_io.save_png(images[n], tmp_path / f'{n}.png')) for n in (2, 3)]
    command = ['sample', *PROMPTS[:2], '--count', '2', '--image', *paths, '--keep', '2']
    command += ['--model', folder, '--out', str(tmp_path / 'out'), '--share']
    assert cli.main([*command, '1', '2']) == 0
    assert '2 images of other shares do not exist yet' in capsys.readouterr().out
    assert cli.main([*command, '0', '2']) == 0
    assert cli.main([*command, '1', '2']) == 0  # of which nothing is missing
    assert 'grid.png' in capsys.readouterr().out
    made = [image_io.load_image(tmp_path / 'out' / f'{n:06d}.png') for n in range(4)]
    expected = pipe(PROMPTS[:2] * 2, image=list(images[2:4]) * 2, keep=2)
    assert np.abs(np.stack(made).astype(int) - expected).max() <= 1


@pytest.mark.usefixtures('compiled_here')
def test_image_does_not_depend_on_a_mesh_that_shards_parameters(folder, images):
    pipe = star_jax.load(
        folder, mesh=MeshShape(data=1, fsdp=2, tensor=2, sequence=2).build_on_first()
    )
    again = pipe(PROMPTS, seed=SEED, guidance=2.0, top_k=8, top_p=0.8)
    np.testing.assert_array_equal(again, images)
    kernel = pipe._params['model']['blocks']['ffn']['fc1']['kernel']
    assert kernel.sharding.shard_shape(kernel.shape)[1:] == tuple(n // 2 for n in kernel.shape[1:])


def test_guidance_off_equals_guidance_of_almost_zero(pipe):
    """Prompted rows alone give the images that they give beside unprompted ones of no weight."""
    alone = pipe(PROMPTS[:2], guidance=0.0, top_k=8)
    beside = pipe(PROMPTS[:2], guidance=1e-12, top_k=8)
    np.testing.assert_array_equal(alone, beside)


def test_all_scales_given_are_the_reconstruction_and_none_is_sampling(pipe, images):
    settings = {'seed': SEED, 'guidance': 2.0, 'top_k': 8, 'top_p': 0.8}
    given = images[:2].repeat(2, axis=1)[:, :, 4:-4]  # of another size
    kept = pipe(PROMPTS[:2], image=list(given), keep=3, **settings)
    bound = bind(pipe.tokenizer, pipe._params['tokenizer'])
    cropped = np.stack([image_io.crop(image, 16) for image in given])
    rebuilt = np.asarray(pipe.tokenizer.to_uint8(bound(pixels.to_signed(cropped))))
    assert np.abs(kept.astype(int) - rebuilt).max() <= 1
    sampled = pipe(PROMPTS[:2], image=list(given), keep=0, **settings)
    np.testing.assert_array_equal(sampled, images[:2])


def test_continued_image_does_not_depend_on_the_batch(pipe, images):
    settings = {'guidance': 2.0, 'top_k': 8, 'top_p': 0.8, 'keep': 2}
    together = pipe(PROMPTS[:3], seed=SEED, image=images[2:], **settings)
    assert (together[0] != images[0]).any() and (together[0] != images[2]).any()
    alone = pipe(PROMPTS[1:2], seed=SEED + 1, image=Image.fromarray(images[3]), **settings)
    np.testing.assert_array_equal(alone[0], together[1])
    of_one = pipe(PROMPTS[:3], seed=SEED, image=images[3], **settings)
    np.testing.assert_array_equal(of_one[1], together[1])


def test_settings_left_out_are_the_recommended_ones(pipe):
    assert pipe.resolve() == pipe.recommended
    assert pipe.resolve(top_k=3) == dataclasses.replace(pipe.recommended, top_k=3)
    assert pipe.resolve(stable=True).stable == StableSettings(version='1024')
    assert pipe.resolve(stable=False).stable == StableSettings()
    with pytest.raises(UserError, match='guidance_per_step has 99 numbers'):
        pipe.resolve(guidance_per_step=[4.0] * 99)


def test_released_and_corrected_images_differ_under_guidance(folder, pipe):
    released = star_jax.load(folder, cross_attention='released')
    prompts, settings = PROMPTS[:2], {'guidance': 3.0, 'top_k': 8}
    assert (released(prompts, **settings) != pipe(prompts, **settings)).any()
    plain = settings | {'guidance': 0.0}
    np.testing.assert_array_equal(released(prompts, **plain), pipe(prompts, **plain))
    assert not star_jax.load(folder, cross_attention='corrected').network.mixes_rows


def test_batches_need_few_programs():
    assert batches(37, 16, 1) == [16, 16, 8]
    assert batches(3, 16, 1) == [4]
    assert batches(16, 16, 4) == [16]
    assert batches(1, 2, 4) == [4]
    assert batches(21, 6, 4) == [8, 8, 8]
    assert batches(0, 4, 1) == []
    assert batches(17, 16, 1, exact=True) == [16, 16]
    assert batches(1, 6, 4, exact=True) == [8]
    assert batches(0, 4, 1, exact=True) == []


@pytest.mark.parametrize(
    ('prompts', 'settings', 'sentence'),
    [
        ([], {}, 'there is no prompt'),
        ('a red fox', {}, 'as a list, not as one text'),
        (['a'], {'batch': 0}, 'batch must be at least 1, not 0'),
        (['a'], {'batch': 10**12, 'exact': True}, 'a batch of 1,000,000,000,000 images would take'),
        (['a', 'b'], {'seed': 2**32 - 1}, 'seeds of 2 images must lie in'),
        (['a'], {'topk': 3}, "no setting 'topk' of sampling: choose of guidance, top_k"),
        (['a'], {'top_p': 2.0}, 'top_p must lie in'),
        (['a'], {'stable': True}, 'refinement head'),
        (['a'], {'keep': 1}, 'keep is 1, but there is no image: give one, or leave keep out'),
        (['a'], {'keep': 4, 'image': BLACK}, 'keep is 4, but an image of this model has 3 scales'),
        (['a'], {'keep': -1}, 'keep is -1, but an image of this model has 3 scales: choose 0 to 3'),
        (['a'] * 3, {'keep': 1, 'image': [BLACK] * 2}, 'there are 2 images for 3 prompts'),
    ],
)
def test_mistake_raises_a_sentence(pipe, prompts, settings, sentence):
    with pytest.raises(UserError, match=sentence):
        pipe(prompts, **settings)


@pytest.mark.parametrize(
    ('prompts', 'settings', 'sentence'),
    [
        (None, {}, 'as a list of texts, not as None: give a list'),
        (7, {}, 'as a list of texts, not as 7'),
        (b'a cat', {}, 'as a list of texts, not as a bytes'),
        ({'a', 'b'}, {}, 'as a list of texts, not as a set'),
        ({'a': 1}, {}, 'as a list of texts, not as a dict'),
        ((text for text in 'ab'), {}, 'as a list of texts, not as a generator'),
        (np.array(['a', 'b']), {}, r'not as a numpy array of shape \(2,\)'),
        (['a', None], {}, 'prompt 1 is None, expected a text'),
        ([b'a'], {}, 'prompt 0 is a bytes, expected a text'),
        ([['a']], {}, 'prompt 0 is a list, expected a text'),
        (['a'], {'seed': None}, 'seed must be a whole number, or a list of one per prompt, not N'),
        (['a'], {'seed': 1.5}, 'seed must be a whole number, .*, not 1.5'),
        (['a'], {'seed': '1'}, "seed must be a whole number, .*, not '1'"),
        (['a'], {'seed': b'a'}, 'seed must be a whole number, .*, not a bytes'),
        (['a'], {'seed': True}, 'seed must be a whole number, .*, not True'),
        (['a'], {'seed': [None]}, 'seed 0 must be a whole number, not None'),
        (['a'], {'seed': np.array([0.5])}, 'seed 0 must be a whole number, not 0.5'),
        (['a'], {'batch': None}, 'batch must be a whole number, not None'),
        (['a'], {'batch': 2.0}, 'batch must be a whole number, not 2.0'),
        (['a'], {'exact': 1}, 'exact must be True or False, not 1'),
        (['a'], {'top_k': None}, r'top_k must be a whole number \(0: all\), not None'),
        (['a'], {'top_k': 5.0}, r'top_k must be a whole number \(0: all\), not 5.0'),
        (['a'], {'top_p': [0.5]}, r'top_p must be a number \(0: all\), not a list'),
        (['a'], {'guidance': '4'}, r"guidance must be a number, not '4'"),
        (['a'], {'guidance': np.ones(2)}, 'guidance must be a number, not a numpy array'),
        (['a'], {'temperature': None}, 'temperature must be a number, not None'),
        (['a'], {'temperature': True}, 'temperature must be a number, not True'),
        (['a'], {'guidance_per_step': 4}, 'guidance_per_step must be a tuple of numbers, not 4'),
        (['a'], {'guidance_per_step': ['a']}, 'a number of guidance_per_step must be a number, n'),
        (['a'], {'guidance_layers': (0.5,)}, 'a number of guidance_layers must be a whole number'),
        (['a'], {'negative': None}, 'negative must be a text, not None'),
        (['a'], {'stop': 1.0}, r'stop must be a whole number \(0: all steps\), not 1.0'),
        (['a'], {'smooth': 'yes'}, "smooth must be True or False, not 'yes'"),
        (['a'], {'smooth': 1}, 'smooth must be True or False, not 1'),
        (['a'], {'image': 'cat.png'}, "image must be one image or a list of them, not 'cat.png'"),
        (['a'], {'image': [None]}, r'image 0 is None, expected a uint8 array \(height, width, 3\)'),
        (['a'], {'image': BLACK[0, 0]}, r'shape \(3,\) of uint8, expected a uint8 array'),
        (['a'], {'image': BLACK / 255}, r'shape \(16, 16, 3\) of float64, expected a uint8 array'),
        (['a'], {'keep': 1.5, 'image': BLACK}, 'keep must be a whole number, not 1.5'),
        (['a'], {'stable': 'new'}, "stable must be True, False or a StableSettings, not 'new'"),
        (['a'], {'stable': None}, 'stable must be True, False or a StableSettings, not None'),
    ],
)
def test_wrong_type_raises_a_sentence(pipe, prompts, settings, sentence):
    with pytest.raises(TypeError, match=sentence) as caught:
        pipe(prompts, **settings)
    assert isinstance(caught.value, star_jax.UserError) and isinstance(caught.value, ValueError)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
    ('prompts', 'settings', 'sentence'),
    [
        (['a', 'b'], {'seed': [1]}, 'there are 1 seeds for 2 prompts: give one seed per prompt'),
        (['a', 'b'], {'seed': [1, -1]}, r'must lie in \[0, 2\^32\), and -1 does not'),
        (['a'], {'seed': -1}, r'must lie in \[0, 2\^32\), and -1 does not'),
        (['a'], {'guidance': float('nan')}, 'guidance must lie in .*, not nan'),
        (['\udc80'], {}, r"prompt 0 is '\\udc80', expected text that UTF-8 can encode"),
        (['a'], {'negative': '\ud800'}, r"negative is '\\ud800', expected text that UTF-8 can"),
        (
            ['a'],
            {'guidance': 0.0, 'negative': 'a ring'},
            "negative is 'a ring', but no step is guided, so .*: give a larger guidance",
        ),
        (['a'], {'image': Image.new('F', (9, 9)), 'keep': 1}, '9 x 9 pixels of mode F, expected'),
        (['a'], {'image': Image.new('RGB', (0, 0)), 'keep': 1}, 'image 0 has 0 x 0 pixels'),
        (['a'], {'image': closed_image(), 'keep': 1}, 'image 0 cannot be read .*: give another'),
    ],
)
def test_wrong_value_raises_a_sentence(pipe, prompts, settings, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        pipe(prompts, **settings)
    assert not isinstance(caught.value, TypeError)


def test_a_recommended_negative_prompt_needs_no_guidance():
    config, plain = tiny.STAR.model, Settings(guidance=0.0)
    recommended = Settings(guidance=2.0, negative='a ring')
    program.check_negative(config, dataclasses.replace(recommended, guidance=0.0), recommended)
    program.check_negative(config, plain, plain)
    program.check_negative(config, dataclasses.replace(recommended, negative='a star'), recommended)
    with pytest.raises(UserError, match="negative is 'a star', but no step is guided"):
        program.check_negative(config, dataclasses.replace(plain, negative='a star'), recommended)


@pytest.mark.parametrize('layers', [(0,), (-1,)])
def test_a_negative_prompt_needs_guidance_before_the_last_sampled_step(layers):
    config = tiny.STAR.model
    guidance = (0.0, 0.0, *[2.0] * (config.schedule.steps - 2))
    settings = Settings(guidance_per_step=guidance, negative='a star', guidance_layers=layers)
    for stop in (0, 3):
        program.check_negative(config, dataclasses.replace(settings, stop=stop), Settings())
    with pytest.raises(UserError, match="negative is 'a star', but no step is guided"):
        program.check_negative(config, dataclasses.replace(settings, stop=2), Settings())


@pytest.mark.parametrize(
    ('options', 'sentence'),
    [
        ({'dtype': 'fp16'}, "dtype must be one of 'float32', 'bfloat16', not 'fp16'"),
        (
            {'dtype': np.float32},
            "dtype must be one of 'float32', 'bfloat16', not the class float32",
        ),
        ({'dtype': None}, 'dtype must be one of .*, not None'),
        ({'cross_attention': 'x'}, "cross_attention must be one of 'as_trained', .*, not 'x'"),
        ({'cross_attention': None}, 'cross_attention must be one of .*, not None'),
        ({'mesh': MeshShape()}, 'mesh must be a jax.sharding.Mesh, .*, not a MeshShape'),
        ({'text': None}, r'text must be a path or a hub id .*, not None'),
        ({'source': None}, 'source must be a path, a hub id or a shipped model, not None'),
        ({'source': b'x'}, 'source must be a path, .*, not a bytes'),
        ({'buckets': 3}, 'buckets are pairs'),
        ({'buckets': 'ab'}, 'buckets are pairs'),
    ],
)
def test_load_refuses_an_argument_in_a_sentence(folder, options, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        star_jax.load(**({'source': folder} | options))
    wrong_type = not isinstance(next(iter(options.values())), str)
    assert isinstance(caught.value, TypeError) == wrong_type


@pytest.mark.parametrize('field', ['depth', 'width', 'heads', 'codes', 'channels'])
@pytest.mark.parametrize('value', [None, '16', [1]])
def test_sizes_of_a_model_check_their_types(field, value):
    with pytest.raises(TypeError, match=f'{field} must be a whole number, not') as caught:
        Star(**{field: value})
    assert isinstance(caught.value, UserError)
    with pytest.raises(TypeError, match='^tensor must be a whole number, not'):
        MeshShape(tensor=value)


WRONG = [
    (Run, {'batch': '8'}, "batch must be a whole number, not '8'"),
    (Run, {'ema': None}, 'ema must be a number, not None'),
    (Run, {'data': 3, 'tokenizer': None}, 'data must be a Shapes or a .*, not 3'),
    (Run, {'dtype': np.float32}, "dtype must be one of 'float32', 'bfloat16', not the class float"),
    (Run, {'mesh': (1, 2)}, 'mesh must be a MeshShape, not a tuple'),
    (TokenizerRun, {'model': None}, 'model must be a TokenizerConfig, not None'),
    (Pace, {'log': 1.5}, 'log must be a whole number, not 1.5'),
    (AdamW, {'learning_rate': 0.1}, 'learning_rate must be a LearningRate, not 0.1'),
    (LearningRate, {'peak': 'high'}, "peak must be a number, not 'high'"),
    (Shapes, {'objects': 3}, 'objects must be a tuple, each item a whole number, not 3'),
    (Folder, {'path': Path('images')}, 'path must be a text, not a PosixPath'),
    (Prepared, {'path': None}, 'path must be a text, not None'),
    (Star, {'sides': [1, 2]}, 'sides must be a tuple, each item a whole number, not a list'),
    (Star, {'positions': 'rotary'}, "positions must be a .*, not 'rotary'"),
    (Autoencoder, {'multipliers': 3}, 'multipliers must be a tuple, .*, not 3'),
    (EvalOptions, {'model': 'shipped', 'metrics': 'loss'}, "metrics must be a tuple, .*, not 'lo"),
    (Pipeline, {'model': 'shipped', 'encoder': None}, "model must be a StoredModel; .*'shipped'"),
]


@pytest.mark.parametrize(('kind', 'fields', 'sentence'), WRONG)
def test_configs_check_their_types(kind, fields, sentence):
    with pytest.raises(TypeError, match=sentence) as caught:
        kind(**fields)
    assert isinstance(caught.value, UserError) and '\n' not in str(caught.value)


def test_wrong_word_in_a_config_is_no_wrong_type():
    with pytest.raises(UserError, match="remat must be one of 'none', .*, not 'all'") as caught:
        Run(remat='all')
    assert not isinstance(caught.value, TypeError)
    number = np.int64(64)
    assert Run(batch=number, ema=np.float32(0.5), model=Star(width=number, heads=2)).batch == 64


def test_settings_check_their_types():
    with pytest.raises(
        TypeError, match="stable.version must be one of 'off', 'new', '1024', not 3"
    ):
        StableSettings(version=3)
    with pytest.raises(ValueError, match="stable.mode must be one of .*, not 'x'"):
        StableSettings(mode='x')
    assert star_jax.Settings(top_k=np.int64(3), guidance=np.float32(2), smooth=np.True_).top_k == 3


def test_seeds_may_be_a_list_with_one_per_image(pipe, images):
    seeds = [SEED + 3, SEED, SEED + 1]
    prompts = [PROMPTS[3], PROMPTS[0], PROMPTS[1]]
    settings = {'guidance': 2.0, 'top_k': np.int64(8), 'top_p': 0.8}
    for given in (seeds, tuple(seeds), np.array(seeds)):
        np.testing.assert_array_equal(pipe(prompts, seed=given, **settings), images[[3, 0, 1]])
    again = pipe(tuple(prompts[:1]), seed=np.int32(SEED + 3), **settings)
    np.testing.assert_array_equal(again, images[3:4])


@pytest.mark.parametrize('kind', [tuple, collections.deque, collections.UserList, Words])
def test_prompts_may_be_any_sequence(pipe, images, kind):
    again = pipe(kind(PROMPTS), seed=SEED, guidance=2.0, top_k=8, top_p=0.8)
    np.testing.assert_array_equal(again, images)


def test_stream_checks_its_arguments_before_it_is_iterated(pipe):
    settings = pipe.resolve()
    for (*arguments, batch), sentence in (
        ((['a'], [0, 1], settings, 4), 'there are 2 seeds for 1 prompts'),
        (([None], [0], settings, 4), 'prompt 0 is None'),
        ((['a'], [0], {'top_k': 3}, 4), 'settings must be a Settings'),
        ((['a'], [0], settings, 0), 'batch must be at least 1'),
    ):
        with pytest.raises(UserError, match=sentence):
            pipe.stream(*arguments, batch=batch)


def test_repr_describes_a_pipeline(pipe):
    assert re.fullmatch(
        r'<Pipeline: Star of [\d,]+ parameters, from text to images of 16 x 16 px, float32, '
        r'on 1 x cpu>',
        repr(pipe),
    )


def test_package_lists_what_it_has():
    assert re.fullmatch(r'\d+\.\d+\.\d+', star_jax.__version__)
    assert {'load', 'Pipeline', 'Settings', 'UserError', '__version__'} <= set(dir(star_jax))
    assert all(getattr(star_jax, name) is not None for name in dir(star_jax))
    assert star_jax.Pipeline is Pipeline
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        star_jax.lode  # noqa: B018
    assert issubclass(star_jax.UserTypeError, TypeError) and issubclass(UserError, ValueError)


def test_mesh_that_does_not_divide_the_model_is_refused(folder):
    with pytest.raises(UserError, match='of the model does not divide over the mesh'):
        star_jax.load(folder, mesh=MeshShape(data=1, tensor=4).build_on_first())  # two heads


def test_mesh_of_too_many_devices_is_refused():
    with pytest.raises(UserError, match=f'there are {jax.device_count()}'):
        MeshShape(data=64).build_on_first()
