"""The tokenizer of `emoji_tokenizer.py`, with LPIPS and a discriminator in the last 600 steps.

pip install -e '.[emoji,lpips]'
star-jax train-tokenizer configs/emoji_tokenizer.py --pace.steps 1400 --out runs/emoji_1400
star-jax train-tokenizer configs/emoji_tokenizer_gan.py --init runs/emoji_1400/model \
  --out runs/emoji_tokenizer_gan
"""

import dataclasses
from pathlib import Path

from star_jax.checkpoint.config import load_run
from star_jax.losses.augmentation import Augmentation
from star_jax.nn.discriminators import PatchGAN
from star_jax.training.objective import Adversary, Objective
from star_jax.training.optimizer import AdamW
from star_jax.training.run import Pace, TokenizerRun
from star_jax.training.schedules import LearningRate

PLAIN = load_run(Path(__file__).with_name('emoji_tokenizer.py'), TokenizerRun)

run = dataclasses.replace(
    PLAIN,
    objective=Objective(
        perceptual=1.0,
        adversary=Adversary(
            discriminator=PatchGAN(width=32, layers=2),
            weight=0.1,  # a larger share of the gradient leaves grain in flat areas
            start=1,
            adaptive=True,
            largest=1.0,  # the first gradients are short; the published 1e4 lengthens them 16 times
            augmentation=Augmentation(),
            optimizer=AdamW(
                # at 2e-4 it was right about every image in the end, and the decoder followed it
                learning_rate=LearningRate(peak=5e-5, warmup_steps=0, end=1.0),
                weight_decay=0.0,
                beta1=0.5,
                beta2=0.9,
            ),
        ),
    ),
    optimizer=AdamW(
        learning_rate=LearningRate(peak=1e-3, warmup_steps=50, end=0.02, shape='cos'),
        weight_decay=0.0,
    ),
    pace=Pace(steps=600, log=25, sample=200, save=100),
    plain_steps=0,
    ema=0.99,
)
