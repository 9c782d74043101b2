"""Infinity's bitwise tokenizer at 256 px, 32 bits a cell, with a discriminator.

Infinity published the tokenizer and a helper for its entropies (Infinity specification 3), but not
the training script. Numbers marked with a star are those of LlamaGen (LlamaGen specification 1.5 to
1.7), whose encoder and decoder are of the same kind. Replace the path.
"""

from star_jax.core.templates import PUBLISHED
from star_jax.data.crops import RandomCrops
from star_jax.data.prepared import Prepared
from star_jax.losses.tokenizer import EntropyOfBits
from star_jax.nn.discriminators import PatchGAN
from star_jax.tokenizers.residual_bsq import BSQ
from star_jax.training.objective import PUBLISHED_OPTIMIZER, Adversary, Objective
from star_jax.training.run import Pace, TokenizerRun

run = TokenizerRun(
    # Infinity specification 2.1 and 3.1
    model=BSQ(grids=PUBLISHED.schedule('1.0', 7).grids, bits=32),
    data=Prepared(path='sets/images'),
    crops=RandomCrops(enlarge=1.25, least=1.0),  # *
    flip=0.5,  # *
    validation=Prepared(path='', split='validation'),
    objective=Objective(
        l1=0.0,
        l2=1.0,  # *
        edges=0.0,
        perceptual=1.0,  # *
        commitment=0.25,  # Infinity specification 3.6
        # 3.6: zeta x penalty / T x 0.1 with T = 100; zeta and the penalty are not published: 1.
        entropy=EntropyOfBits(weight=0.1 / 100, inverse_temperature=100.0, diversity=1.0),
        adversary=Adversary(
            discriminator=PatchGAN(),  # *
            weight=0.5,  # *
            start=20_000,  # *
            optimizer=PUBLISHED_OPTIMIZER,  # *
        ),
    ),
    optimizer=PUBLISHED_OPTIMIZER,  # *
    pace=Pace(steps=400_000, log=100, sample=5_000, save=5_000),  # *
    batch=128,  # *
    plain_steps=0,  # bits have no codebook that would have to start
    dtype='bfloat16',  # *
)
