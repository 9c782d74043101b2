"""The tokenizer of the positions study: one for 64 px and 128 px, trained in turn on two cores.

Its architecture is that of `configs/shapes_tokenizer.py`, with one phi convolution for all scales:
so a scale is refined by the same weights at both sizes.
"""

from star_jax.core.schedule import square_grids
from star_jax.data.shapes import Shapes
from star_jax.tokenizers.autoencoder import Autoencoder
from star_jax.tokenizers.residual_vq import VQ
from star_jax.training.optimizer import AdamW
from star_jax.training.run import Pace, SizeInTurn, TokenizerRun
from star_jax.training.schedules import LearningRate

run = TokenizerRun(
    model=VQ(
        autoencoder=Autoencoder(width=48, multipliers=(1, 2), blocks=1, groups=16, stem=4),
        grids=square_grids((1, 2, 3, 5, 8)),
        codes=512,
        channels=16,
        phis=1,
    ),
    other_sizes=(SizeInTurn(grids=square_grids((1, 2, 3, 5, 8, 16)), batch=2),),
    data=Shapes(count=200_000, objects=(1, 2)),
    validation=Shapes(count=512, split='validation', objects=(1, 2)),
    optimizer=AdamW(
        learning_rate=LearningRate(peak=1e-3, warmup_steps=200, end=0.02, shape='lin'),
        weight_decay=0.0,
    ),
    pace=Pace(steps=60_000, log=100, sample=2_000, save=500),
    batch=8,
    plain_steps=1_000,
    restart_every=100,
    ema=0.999,
)
