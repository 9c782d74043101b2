"""The tokenizer of `emoji_tokenizer.py` with LPIPS and a discriminator, for as many steps.

pip install -e '.[emoji,lpips]'
star-jax train-tokenizer configs/emoji_tokenizer_gan.py --out runs/emoji_tokenizer_gan
"""

from star_jax.core.schedule import square_grids
from star_jax.data.prepared import Prepared
from star_jax.losses.augmentation import Augmentation
from star_jax.nn.discriminators import PatchGAN
from star_jax.tokenizers.autoencoder import Autoencoder
from star_jax.tokenizers.residual_vq import VQ
from star_jax.training.objective import Adversary, Objective
from star_jax.training.optimizer import AdamW
from star_jax.training.run import Pace, TokenizerRun
from star_jax.training.schedules import LearningRate

run = TokenizerRun(
    model=VQ(
        autoencoder=Autoencoder(width=48, multipliers=(1, 2), blocks=1, groups=16, stem=4),
        grids=square_grids((1, 2, 3, 4, 6, 8)),
        codes=1024,
        channels=16,
    ),
    data=Prepared(path='sets/emoji', split='train'),
    validation=Prepared(path='sets/emoji', split='held_out_labels'),
    objective=Objective(
        perceptual=1.0,
        adversary=Adversary(
            discriminator=PatchGAN(width=32, layers=2),  # patches of 22 px
            weight=0.5,
            start=800,  # once the codes are in use and colours are right
            adaptive=True,
            augmentation=Augmentation(),
            optimizer=AdamW(
                learning_rate=LearningRate(peak=2e-4, warmup_steps=0, end=1.0),
                weight_decay=0.0,
                beta1=0.5,
                beta2=0.9,
            ),
        ),
    ),
    optimizer=AdamW(
        learning_rate=LearningRate(peak=1.5e-3, warmup_steps=200, end=0.02, shape='cos'),
        weight_decay=0.0,
    ),
    pace=Pace(steps=2_000, log=50, sample=500, save=250),
    batch=32,
    plain_steps=300,
    ema=0.998,
)
