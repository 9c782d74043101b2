"""The shipped tokenizer, that of step 2,500 of this run: scenes of shapes at 64 px, 85 tokens."""

from star_jax.data.shapes import Shapes
from star_jax.tokenizers.autoencoder import Autoencoder
from star_jax.tokenizers.residual_vq import VQ
from star_jax.training.optimizer import AdamW
from star_jax.training.run import Pace, TokenizerRun
from star_jax.training.schedules import LearningRate

run = TokenizerRun(
    model=VQ(
        autoencoder=Autoencoder(width=48, multipliers=(1, 2), blocks=1, groups=16, stem=4),
        sides=(1, 2, 4, 8),
        codes=512,
        channels=16,
    ),
    data=Shapes(count=200_000),
    validation=Shapes(count=512, split='validation'),
    optimizer=AdamW(
        learning_rate=LearningRate(peak=1.5e-3, warmup_steps=200, end=0.02, shape='cos'),
        weight_decay=0.0,
    ),
    pace=Pace(steps=5_000, log=50, sample=500, save=250),
    batch=32,
    plain_steps=400,
    ema=0.998,
)
