"""The published refinement head of STAR-d30 at 1024 px: ten epochs on the frozen model.

Loss and weight decay are the published ones; without `unmasking` they are the plain ones. The steps
count 12.8M images per epoch.
"""

from star_jax.core.settings import Settings, StableSettings
from star_jax.data.prepared import Prepared
from star_jax.families.star import Refinement, Star
from star_jax.losses.refinement import ReleasedLoss, Unmasking
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
        refinement=Refinement(first=9, blocks=3),
    ),
    init='runs/star_d30_1024/model',
    text='models/text_encoder',
    data=Prepared(path='sets/captioned'),
    validation=Prepared(path='', split='validation'),
    optimizer=AdamW(
        learning_rate=LearningRate(peak=1e-5, warmup_steps=13_333, shape='lin0'),
        weight_decay=0.05,
    ),
    pace=Pace(steps=666_667, log=100, sample=5_000, save=2_000),
    batch=192,
    dtype='bfloat16',
    text_features='inside',
    remat='full',
    unmasking=Unmasking(loss=ReleasedLoss(), decay_all=True, noisy_base=True),
    sampling=Settings(guidance=4.0, top_k=4096, top_p=0.8, stable=StableSettings(version='1024')),
)
