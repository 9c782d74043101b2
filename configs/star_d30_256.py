"""The published STAR-d30 at 256 px, first stage (STAR specification 7): 40M web images, once.

Replace the paths, as in star_d16_256.py. `--mesh.fsdp 8` splits parameters and their averages over
the GPUs of a node. star_d30_256_stage2.py is the second stage.
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
    tokenizer='models/published_tokenizer',
    text='models/text_encoder',
    data=Prepared(path='sets/captioned'),
    validation=Prepared(path='', split='validation'),
    optimizer=AdamW(
        learning_rate=LearningRate(peak=1e-4, warmup_steps=1_667, shape='lin0'),
        weight_decay=0.05,
    ),
    pace=Pace(steps=83_333, log=100, sample=5_000, save=2_000),
    batch=480,
    dtype='bfloat16',
    text_features='inside',
    remat='full',
    sampling=Settings(guidance=4.0, top_k=600, top_p=0.8),
)
