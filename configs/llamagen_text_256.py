"""LlamaGen-XL by text at 256 px, stage 1 of 2 (LlamaGen specification 4.3).

Replace the paths: a prepared set of images with captions, the
converted tokenizer (vq_ds16_t2i.pt) and the text encoder, flan-t5-xl.
"""

from star_jax.core.settings import Settings
from star_jax.data.prepared import Prepared
from star_jax.data.resizing import HalvedBicubic
from star_jax.families.llamagen import LlamaGenText
from star_jax.training.optimizer import AdamW
from star_jax.training.run import Pace, Run
from star_jax.training.schedules import LearningRate

run = Run(
    model=LlamaGenText.published('XL', grid=(16, 16)),
    tokenizer='models/llamagen_text_tokenizer',
    text='models/flan-t5-xl',
    text_dtype='bfloat16',
    data=Prepared(path='sets/captioned', resizing=HalvedBicubic()),  # 1.8 and 4.3
    validation=Prepared(path='', split='validation', resizing=HalvedBicubic()),
    optimizer=AdamW(
        learning_rate=LearningRate(peak=1e-4, warmup_steps=0, end=1.0),
        weight_decay=0.05,
        beta1=0.9,
        beta2=0.95,
        clip=1.0,
    ),
    pace=Pace(steps=200_000, log=100, sample=10_000, save=5_000),
    batch=256,
    caption_drop=0.1,
    dtype='bfloat16',
    remat='full',
    sampling=Settings(guidance=7.5, top_k=1000, top_p=0.0),
)
