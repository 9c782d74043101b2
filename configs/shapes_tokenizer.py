"""The shipped tokenizer: scenes of one to three shapes at 64 px, 85 tokens, trained on two cores.

The batch is small: after one minute, 8 images per step were 2 dB ahead of 32 per step.
"""

from star_jax.core.schedule import square_grids
from star_jax.data.shapes import Shapes
from star_jax.tokenizers.autoencoder import Autoencoder
from star_jax.tokenizers.residual_vq import VQ
from star_jax.training.optimizer import AdamW
from star_jax.training.run import Pace, TokenizerRun
from star_jax.training.schedules import LearningRate

run = TokenizerRun(
    model=VQ(
        autoencoder=Autoencoder(width=48, multipliers=(1, 2), blocks=1, groups=16, stem=4),
        grids=square_grids((1, 2, 4, 8)),
        codes=512,
        channels=16,
    ),
    data=Shapes(count=200_000),
    validation=Shapes(count=512, split='validation'),
    optimizer=AdamW(
        learning_rate=LearningRate(peak=1e-3, warmup_steps=200, end=0.02, shape='lin'),
        weight_decay=0.0,
    ),
    pace=Pace(steps=30_000, log=100, sample=2_000, save=1_000),
    batch=8,
    plain_steps=1_000,
    restart_every=100,
    ema=0.999,
)
