"""A transformer on captioned emoji at 64 px, with the tokenizer of `configs/emoji_tokenizer.py`."""

from star_jax.core.settings import Settings
from star_jax.data.prepared import Prepared
from star_jax.families.star import Star
from star_jax.nn.positions import NormalisedRotary
from star_jax.training.optimizer import AdamW
from star_jax.training.run import Pace, Run
from star_jax.training.schedules import LearningRate

run = Run(
    model=Star(
        depth=4,
        width=192,
        heads=6,
        sides=(1, 2, 3, 4, 6, 8),
        codes=1024,
        channels=16,
        text_width=384,
        positions=NormalisedRotary(theta=100, extent=32),
    ),
    tokenizer='runs/emoji_tokenizer/model',
    data=Prepared(path='sets/emoji', split='train'),
    validation=Prepared(path='', split='held_out_pairs'),
    optimizer=AdamW(learning_rate=LearningRate(peak=1.5e-3, warmup_steps=200, shape='lin')),
    pace=Pace(steps=1_600, log=50, sample=400, save=200),
    batch=32,
    ema=0.998,
    sampling=Settings(guidance=2.0, top_k=100, top_p=0.9),
)
