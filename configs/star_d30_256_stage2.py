"""The published STAR-d30 at 256 px, second stage: four epochs of filtered images at half the rate.

It warm-starts from the model of star_d30_256.py. The number of filtered images is not published;
the steps count 12.8M in each epoch, as in star_d16_256.py.
"""

from star_jax.core.settings import Settings
from star_jax.data.prepared import Prepared
from star_jax.families.star import Star
from star_jax.training.optimizer import AdamW
from star_jax.training.run import Pace, Run
from star_jax.training.schedules import LearningRate

run = Run(
    model=Star(
        depth=30,
        width=1920,
        heads=30,
        sides=(1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
        drop_path=0.1 * 30 / 24,
    ),
    init='runs/star_d30_256/model',
    text='models/text_encoder',
    data=Prepared(path='sets/captioned'),
    validation=Prepared(path='', split='validation'),
    optimizer=AdamW(
        learning_rate=LearningRate(peak=5e-5, warmup_steps=2_133, shape='lin0'),
        weight_decay=0.05,
    ),
    pace=Pace(steps=106_667, log=100, sample=5_000, save=2_000),
    batch=480,
    dtype='bfloat16',
    text_features='inside',
    remat='full',
    sampling=Settings(guidance=4.0, top_k=600, top_p=0.8),
)
