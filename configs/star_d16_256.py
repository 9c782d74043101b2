"""The published STAR-d16 at 256 px (STAR specification 7), for a TPU pod or a node of GPUs.

Replace the paths: the published tokenizer as a model folder, a text encoder with 77 tokens of width
1024, and a set of captioned images. The published run has ten epochs of 12.8M images.
`star-jax bench sample` only needs the model and the sampling settings.
"""

from star_jax.core.settings import Settings
from star_jax.data.prepared import Prepared
from star_jax.families.star import Star
from star_jax.training.optimizer import AdamW
from star_jax.training.run import Pace, Run
from star_jax.training.schedules import LearningRate

run = Run(
    model=Star(
        depth=16,
        width=1024,
        heads=16,
        sides=(1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
        codes=4096,
        channels=32,
        text_width=1024,
        drop_path=0.1 * 16 / 24,
    ),
    tokenizer='models/published_tokenizer',
    text='models/text_encoder',
    data=Prepared(path='sets/captioned'),
    validation=Prepared(path='', split='validation'),
    optimizer=AdamW(
        learning_rate=LearningRate(peak=1e-4, warmup_steps=5_000, shape='lin0'),
        weight_decay=0.05,
    ),
    pace=Pace(steps=250_000, log=100, sample=5_000, save=2_000),
    batch=512,
    caption_drop=0.1,
    dtype='bfloat16',
    text_features='inside',
    sampling=Settings(guidance=4.0, top_k=600, top_p=0.8),
)
