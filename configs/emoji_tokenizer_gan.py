"""The tokenizer of `emoji_tokenizer.py` with LPIPS and a discriminator, for as many steps.

pip install -e '.[emoji,lpips]'
star-jax train-tokenizer configs/emoji_tokenizer_gan.py --out runs/emoji_tokenizer_gan
"""

import dataclasses
from pathlib import Path

from star_jax.checkpoint.config import load_run
from star_jax.losses.augmentation import Augmentation
from star_jax.nn.discriminators import PatchGAN
from star_jax.training.objective import Adversary, Objective
from star_jax.training.optimizer import AdamW
from star_jax.training.run import TokenizerRun
from star_jax.training.schedules import LearningRate

PLAIN = load_run(Path(__file__).with_name('emoji_tokenizer.py'), TokenizerRun)

run = dataclasses.replace(
    PLAIN,
    objective=Objective(
        perceptual=1.0,
        adversary=Adversary(
            discriminator=PatchGAN(width=32, layers=2),
            weight=0.5,
            start=800,  # once the codes are in use and colours are right
            adaptive=True,
            largest=1.0,  # the first gradients are short; the published 1e4 lengthens them 16 times
            augmentation=Augmentation(),
            optimizer=AdamW(
                learning_rate=LearningRate(peak=2e-4, warmup_steps=0, end=1.0),
                weight_decay=0.0,
                beta1=0.5,
                beta2=0.9,
            ),
        ),
    ),
)
