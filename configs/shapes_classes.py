"""A small VAR on images of one shape, conditioned on its colour and form: 51 classes, two cores.

Run `star-jax data cache configs/shapes_classes.py` first, which encodes all images once, and give
the folder that it prints as --cache.
"""

from star_jax.core.settings import Settings
from star_jax.data.scenes import TRAINED
from star_jax.data.shapes import Shapes
from star_jax.families.var import Var
from star_jax.training.optimizer import AdamW
from star_jax.training.run import Pace, Run
from star_jax.training.schedules import LearningRate

run = Run(
    model=Var(
        depth=4,
        width=128,
        heads=4,
        sides=(1, 2, 4, 8),
        codes=512,
        channels=16,
        classes=len(TRAINED),
        names=tuple(' '.join(pair) for pair in TRAINED),
    ),
    data=Shapes(count=20_000, objects=(1,)),
    validation=Shapes(count=256, split='validation', objects=(1,)),
    optimizer=AdamW(learning_rate=LearningRate(peak=2e-3, warmup_steps=50, shape='lin')),
    pace=Pace(steps=6_000, log=100, sample=1_000, save=500),
    batch=32,
    ema=0.999,
    unroll=4,
    sampling=Settings(guidance=1.0, top_k=5, top_p=0.9),
)
