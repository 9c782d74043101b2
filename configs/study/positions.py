"""The study of positions: every kind with three seeds, under equal conditions (docs/positions.md).

    star-jax study run configs/study/positions.py
    star-jax study report docs/results/positions

Scenes of one and two shapes at 64 px (103 tokens), carried to 128 px (359 tokens). One unit takes
20 to 40 minutes on two cores.
"""

import dataclasses

from star_jax.core.settings import Settings
from star_jax.data.prepared import Prepared
from star_jax.data.shapes import Shapes
from star_jax.families.star import Star
from star_jax.nn.positions import (
    Learned,
    MixedRotary,
    NoPositions,
    NormalisedRotary,
    RawRotary,
    RoundedRotary,
    SinCos,
)
from star_jax.studies.arms import Arm, DataSet, LargerSize
from star_jax.studies.positions import PositionsStudy, Stage
from star_jax.training.optimizer import AdamW
from star_jax.training.run import Pace, Run
from star_jax.training.schedules import LearningRate

SETTINGS = {
    'optimizer': AdamW(learning_rate=LearningRate(peak=2e-3, warmup_steps=40, shape='lin')),
    'batch': 16,
    'unroll': 3,
    'sampling': Settings(guidance=1.0, top_k=5, top_p=0.9),
}

shapes = DataSet(
    name='shapes',
    run=Run(
        model=Star(
            depth=3,
            width=128,
            heads=4,
            sides=(1, 2, 3, 5, 8),
            codes=512,
            channels=16,
            text_width=384,
        ),
        tokenizer='docs/results/positions/tokenizer',
        data=Shapes(count=40_000, objects=(1, 2)),
        validation=Shapes(count=512, split='validation', objects=(1, 2)),
        pace=Pace(steps=6_250, log=125, save=625, keep=1),
        **SETTINGS,
    ),
    sampled=250,
    larger=LargerSize(sides=(1, 2, 3, 5, 8, 16), steps=312),
)

emoji = DataSet(
    name='emoji',
    run=Run(
        model=Star(
            depth=3,
            width=128,
            heads=4,
            sides=(1, 2, 3, 4, 6, 8),
            codes=1024,
            channels=16,
            text_width=384,
        ),
        tokenizer='docs/results/positions/emoji_tokenizer',
        data=Prepared(path='sets/emoji', split='train'),
        validation=Prepared(path='sets/emoji', split='held_out_labels'),
        pace=Pace(steps=6_250, log=125, save=625, keep=1),
        **SETTINGS,
    ),
)

normalised = Arm(kind='normalised', positions=NormalisedRotary(theta=100, extent=32))
rounded = Arm(kind='rounded', positions=RoundedRotary(theta=100, reference=(16, 16)))
raw = Arm(kind='raw', positions=RawRotary(theta=100))
mixed = Arm(kind='mixed', positions=MixedRotary(theta=100, extent=32))
learned = Arm(kind='learned', positions=Learned())
sincos = Arm(kind='sincos', positions=SinCos(theta=100, extent=32))
none = Arm(kind='none', positions=NoPositions())


def of_theta(theta: float) -> Arm:
    """The normalised kind with another base of its frequencies."""
    positions = NormalisedRotary(theta=theta, extent=32)
    return Arm(kind=f'normalised-theta{theta}', positions=positions, seeds=(0, 1))


def changed(arm: Arm, **fields: object) -> Arm:
    """An arm with other fields."""
    return dataclasses.replace(arm, **fields)


study = PositionsStudy(
    stages=(
        Stage(data=shapes, arms=(normalised, rounded, raw, mixed, learned, sincos, none)),
        Stage(
            data=shapes,
            arms=tuple(changed(arm, level_embedding=False) for arm in (normalised, rounded, none)),
        ),
        Stage(
            data=emoji, arms=tuple(changed(arm, seeds=(0, 1)) for arm in (normalised, raw, learned))
        ),
        Stage(data=shapes, arms=tuple(map(of_theta, (10, 1_000, 10_000)))),
    )
)
