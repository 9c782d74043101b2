"""Does a class-conditional model train on labels and sample classes, by the commands for text?"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax.core import meta

from star_jax import cli
from star_jax.checkpoint.weights import flatten
from star_jax.convert.entries import to_params, to_state
from star_jax.convert.var import var_entries
from star_jax.core.classes import Classes
from star_jax.core.condition import LabelCondition, choose, repeat, stack
from star_jax.data import pipeline
from star_jax.data.scenes import TRAINED
from star_jax.data.shapes import Shapes
from star_jax.errors import UserError
from star_jax.families.var import Var
from star_jax.training.optimizer import decayed
from star_jax.training.run import Pace, Run
from star_jax.training.transformer_job import TransformerJob

VAR = Var(
    depth=2,
    width=32,
    heads=2,
    sides=(1, 2, 4),
    codes=32,
    channels=4,
    shared_adaln=True,
    classes=len(TRAINED),
    names=tuple(' '.join(pair) for pair in TRAINED),
)


@pytest.fixture(scope='module')
def run(tmp_path_factory) -> Run:
    place = tiny.write_tokenizer(tmp_path_factory.mktemp('tokenizer') / 'model')
    data = dataclasses.replace(tiny.DATA, count=8 * 40)
    pace = Pace(steps=1000)
    return dataclasses.replace(tiny.STAR, model=VAR, tokenizer=place, data=data, pace=pace)


@pytest.fixture(scope='module')
def trained(run, tmp_path_factory) -> tuple[list[float], str]:
    """The losses of a few steps, and the model folder that they made."""
    job = TransformerJob(run)
    state, losses = job.init(), []
    for step, batch in enumerate(itertools.islice(job.batches(0), 40)):
        state, metrics = job.step(step, state, batch)
        losses.append(float(metrics['loss']))
    place = tmp_path_factory.mktemp('trained') / 'model'
    job.export(state, place)
    return losses, str(place)


def test_training_learns_from_labels(trained):
    losses, _ = trained
    assert losses[0] == pytest.approx(np.log(32), abs=0.2)
    assert np.mean(losses[-5:]) < losses[0] - 0.3


def test_classes_are_sampled_by_name_and_by_number(trained, tmp_path, capsys):
    words = ['sample', '--model', trained[1], '--guidance', '1.5', '--out']
    assert cli.main([*words, str(tmp_path / 'a'), '--class', 'red circle', '3']) == 0
    assert [path.name for path in sorted(tmp_path.glob('a/0*'))] == ['000000.png', '000001.png']
    assert '"red circle"' in (tmp_path / 'a' / 'samples.jsonl').read_text()
    assert cli.main([*words, str(tmp_path / 'b'), '--class', 'red elephant']) == 2
    assert not (tmp_path / 'b').exists()
    assert "no class 'red elephant'" in capsys.readouterr().err


def test_text_model_refuses_classes(tmp_path, capsys):
    place = tiny.write_model(tmp_path / 'model')
    assert cli.main(['sample', '--model', place, '--class', '3', '--out', str(tmp_path / 'o')]) == 2
    assert 'has no classes' in capsys.readouterr().err


def test_classes_are_read_as_prompts():
    classes = Classes(3, ('cat', 'dog', '0'))
    assert classes.encode(['dog', '', '2', '0']).ids_B.tolist() == [1, 3, 2, 2]  # names come first
    for wrong in ('3', '-1', 'cow', '²'):
        with pytest.raises(UserError, match='no class'):
            classes.encode([wrong])


def test_dataset_without_labels_is_refused():
    source = pipeline.Labelled(Shapes(count=3, objects=(1,)).open(16))
    example = source[1]
    assert source.captions(1) == example['captions'] == (example['label'],)

    class Unlabelled(type(source.source)):
        def label(self, index):
            return ''

    nothing = pipeline.Labelled(Unlabelled(shapes=source.source.shapes, size=16))
    with pytest.raises(UserError, match='no labels'):
        nothing.captions(0)


def test_label_conditions_stack_and_drop_rows():
    labels = LabelCondition(jnp.array([4, 5]))
    none = repeat(LabelCondition(jnp.array([9])), labels)
    assert stack(labels, none).ids_B.tolist() == [4, 5, 9, 9]
    assert choose(jnp.array([False, True]), labels, none).ids_B.tolist() == [4, 9]


@pytest.mark.parametrize('shared', [False, True])
@pytest.mark.parametrize('qk_norm', [False, True])
def test_a_state_dict_comes_back(shared, qk_norm):
    var = dataclasses.replace(VAR, shared_adaln=shared, qk_norm=qk_norm)
    params = tiny.random_params(var.abstract())
    state = to_state(var_entries(var), params)
    back = to_params(var_entries(var), state)
    assert not back.missing and not back.unknown
    for name, array in flatten(params).items():
        np.testing.assert_array_equal(flatten(back.params)[name], array)


def test_what_decays_is_as_published():
    """STAR specification 6: matrices and class vectors, not biases, positions or levels."""
    var = dataclasses.replace(VAR, shared_adaln=True)
    flat = flatten(decayed(jax.tree.map(lambda x: x, meta.unbox(var.abstract()))))
    kept = {name for name, decays in flat.items() if not decays}
    assert 'starter/classes/table' not in kept and 'modulator/vector/kernel' not in kept
    assert {'starter/position/table', 'table/table', 'levels', 'blocks/modulate/offset'} <= kept
    assert all(name.endswith(('bias', 'table', 'levels', 'offset', 'scale')) for name in kept)


@pytest.mark.parametrize(
    ('fields', 'said'),
    [
        ({'classes': 0}, 'classes must lie'),
        ({'names': ('cat', 'cat')}, 'different ones'),
        ({'classes': 2, 'names': ('cat', '')}, 'stands for none'),
    ],
)
def test_impossible_classes_are_refused(fields, said):
    with pytest.raises(UserError, match=said):
        Var(**fields)
