"""LlamaGen-B, by class at 384 px: 300 epochs of ImageNet (LlamaGen specification 2.1 and 4.1).

Replace the paths: a prepared set of ImageNet with classes, and the converted tokenizer of 16 px a
code (vq_ds16_c2i.pt). `star-jax data cache` with this config encodes ten crops of every image once,
of which a step takes one; the second set of ten, 1.05 times as large as the crops, with which the
original takes turns if it exists, is left out. The learning rate is constant, and dropout is that
of the model's defaults.
"""

from star_jax.core.settings import Settings
from star_jax.data.crops import TenCrops
from star_jax.data.prepared import Prepared
from star_jax.data.resizing import HalvedBicubic
from star_jax.families.llamagen import LlamaGen
from star_jax.training.optimizer import AdamW
from star_jax.training.run import Pace, Run
from star_jax.training.schedules import LearningRate

run = Run(
    model=LlamaGen.published('B', grid=(24, 24)),
    tokenizer='models/llamagen_tokenizer',
    data=Prepared(path='sets/imagenet', resizing=HalvedBicubic()),  # 1.8
    crops=TenCrops(enlarge=1.1),
    validation=Prepared(path='', split='validation', resizing=HalvedBicubic()),
    optimizer=AdamW(
        learning_rate=LearningRate(peak=1e-4, warmup_steps=0, end=1.0),
        weight_decay=0.05,
        beta1=0.9,
        beta2=0.95,
        clip=1.0,
    ),
    pace=Pace(steps=1_501_200, log=100, sample=10_000, save=5_000),
    batch=256,
    caption_drop=0.1,
    dtype='bfloat16',
    remat='none',
    sampling=Settings(guidance=2.0, top_k=0, top_p=0.0),
)
