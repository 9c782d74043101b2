"""The published STAR-d30 at 512 px: five epochs from the model at 256 px, in float32.

Both models have ten scales, so that all weights are reused. The steps count 12.8M images per epoch.
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
        sides=(1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
        drop_path=0.1 * 30 / 24,
    ),
    init='runs/star_d30_256_stage2/model',
    text='models/text_encoder',
    data=Prepared(path='sets/captioned'),
    validation=Prepared(path='', split='validation'),
    optimizer=AdamW(
        learning_rate=LearningRate(peak=5e-5, warmup_steps=6_667, shape='lin0'),
        weight_decay=0.05,
    ),
    pace=Pace(steps=333_333, log=100, sample=5_000, save=2_000),
    batch=192,
    dtype='float32',
    text_features='inside',
    remat='full',
    sampling=Settings(guidance=4.0, top_k=600, top_p=0.8),
)
