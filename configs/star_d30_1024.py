"""The published STAR-d30 at 1024 px: two epochs from the model at 512 px.

The level embeddings of four new scales are initialised at random, and 8,800 of 9,451 tokens are
trained on. `--released-loss-scale` multiplies the loss by the images per device, as the published
code does. The steps count 12.8M images per epoch.
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
        sides=(1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),
        drop_path=0.1 * 30 / 24,
        keep_tokens=8_800,
    ),
    init='runs/star_d30_512/model',
    text='models/text_encoder',
    data=Prepared(path='sets/captioned'),
    validation=Prepared(path='', split='validation'),
    optimizer=AdamW(
        learning_rate=LearningRate(peak=2e-5, warmup_steps=8_000, shape='lin0'),
        weight_decay=0.05,
    ),
    pace=Pace(steps=400_000, log=100, sample=5_000, save=2_000),
    batch=64,
    dtype='bfloat16',
    text_features='inside',
    remat='full',
    sampling=Settings(guidance=4.0, top_k=4096, top_p=0.8),
)
