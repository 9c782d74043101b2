"""A tokenizer of emoji at 64 px; `star-jax data prepare emoji sets/emoji` writes the dataset."""

from star_jax.core.schedule import square_grids
from star_jax.data.prepared import Prepared
from star_jax.tokenizers.autoencoder import Autoencoder
from star_jax.tokenizers.residual_vq import VQ
from star_jax.training.optimizer import AdamW
from star_jax.training.run import Pace, TokenizerRun
from star_jax.training.schedules import LearningRate

run = TokenizerRun(
    model=VQ(
        autoencoder=Autoencoder(width=48, multipliers=(1, 2), blocks=1, groups=16, stem=4),
        grids=square_grids((1, 2, 3, 4, 6, 8)),
        codes=1024,
        channels=16,
    ),
    data=Prepared(path='sets/emoji', split='train'),
    validation=Prepared(path='', split='held_out_labels'),
    optimizer=AdamW(
        learning_rate=LearningRate(peak=1.5e-3, warmup_steps=200, end=0.02, shape='cos'),
        weight_decay=0.0,
    ),
    pace=Pace(steps=2_000, log=50, sample=500, save=250),
    batch=32,
    plain_steps=300,
    ema=0.998,
)
