"""The published Infinity with 125M parameters at 256 px (Infinity specification 6 and 8).

Replace the paths: the published tokenizer as a model folder, flan-t5-xl, and a set of images whose
captions have a long and a short form. Optimizer, learning rate, flips, captions and weights of the
scales are those of the published training script, which has 4 images per GPU and does not warm up;
the length of the published runs is not known. The other sizes have the same recipe.
`star-jax bench sample` only needs the model and the sampling settings.
"""

from star_jax.core.self_correction import SelfCorrection
from star_jax.core.settings import Settings
from star_jax.data.caption_choice import ShortOrLong
from star_jax.data.prepared import Prepared
from star_jax.data.resizing import LanczosCover
from star_jax.families.infinity import Infinity
from star_jax.training.optimizer import AdamW
from star_jax.training.run import Pace, Run
from star_jax.training.schedules import LearningRate

run = Run(
    model=Infinity.published('125M'),
    tokenizer='models/infinity_tokenizer',
    text='models/flan-t5-xl',
    text_dtype='bfloat16',
    text_features='inside',
    data=Prepared(path='sets/captioned', resizing=LanczosCover()),
    captions=ShortOrLong(short=0.5, sentences=True, end='--'),
    validation=Prepared(path='', split='validation', resizing=LanczosCover()),
    optimizer=AdamW(
        learning_rate=LearningRate(
            peak=6e-3, per_images=256, warmup_steps=0, end=1.0, shape='lin0'
        ),
        weight_decay=0.005,
        beta1=0.9,
        beta2=0.97,
        clip=5.0,
    ),
    pace=Pace(steps=100_000, log=100, sample=5_000, save=2_000),
    batch=256,
    caption_drop=0.1,
    balance=0.5,
    correction=SelfCorrection(strength=0.3, scales=13),
    dtype='bfloat16',
    remat='full',
    sampling=Settings(guidance=4.0, top_k=0, top_p=0.97, temperature=0.5),
)
