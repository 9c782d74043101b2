"""The study of Infinity's claims: bits against indices, self-correction, and bits of a token.

    star-jax study run configs/study/infinity.py --results docs/results/infinity --work runs/claims
    star-jax study report docs/results/infinity --out docs/infinity

Scenes of one and two shapes at 64 px (85 tokens). All contenders have the same transformer, steps,
data and seeds; those of 9 bits have the same tokenizer, whose 512 codes are 9 bits or one index.
"""

import dataclasses

from star_jax.core.schedule import square_grids
from star_jax.core.self_correction import SelfCorrection
from star_jax.core.settings import Settings
from star_jax.core.templates import Templates
from star_jax.data.shapes import Shapes
from star_jax.families.infinity import Infinity
from star_jax.losses.tokenizer import EntropyOfBits
from star_jax.studies.runs import Contender, RunsStudy
from star_jax.tokenizers.autoencoder import Autoencoder
from star_jax.tokenizers.residual_bsq import BSQ
from star_jax.training.objective import Objective
from star_jax.training.optimizer import AdamW
from star_jax.training.run import Pace, Run, TokenizerRun
from star_jax.training.schedules import LearningRate

GRIDS = square_grids((1, 2, 4, 8))
TRAIN = Shapes(count=40_000, objects=(1, 2))
VALIDATION = Shapes(count=512, split='validation', objects=(1, 2))


def tokenizer(bits: int) -> TokenizerRun:
    """The training of the tokenizer with so many bits a token."""
    return TokenizerRun(
        model=BSQ(
            autoencoder=Autoencoder(
                width=48, multipliers=(1, 2), blocks=1, groups=16, stem=4, attention=False
            ),
            grids=GRIDS,
            bits=bits,
        ),
        data=dataclasses.replace(TRAIN, count=200_000),
        validation=VALIDATION,
        objective=Objective(commitment=0.25, entropy=EntropyOfBits(weight=0.01)),
        optimizer=AdamW(
            learning_rate=LearningRate(peak=1e-3, warmup_steps=200, end=0.02, shape='lin'),
            weight_decay=0.0,
        ),
        pace=Pace(steps=10_000, log=100, sample=2_000, save=500),
        batch=8,
        plain_steps=0,
        ema=0.999,
    )


def run(bits: int, indexed: bool = False, strength: float = 0.0) -> Run:
    """The training of a transformer."""
    return Run(
        model=Infinity(
            depth=3,
            width=144,
            heads=4,
            drop_path=0.0,
            bits=bits,
            indexed=indexed,
            grids=GRIDS,
            reference=GRIDS[-1],
            templates=Templates(),
            text_width=384,
            text_rows=32,
        ),
        data=TRAIN,
        validation=VALIDATION,
        optimizer=AdamW(
            learning_rate=LearningRate(peak=2e-3, warmup_steps=40, shape='lin'),
            beta2=0.97,
            clip=5.0,
        ),
        pace=Pace(steps=6_250, log=125, save=625, keep=1),
        batch=16,
        unroll=3,
        balance=0.5,
        correction=SelfCorrection(strength=strength),
        sampling=Settings(guidance=3.0, top_k=0, top_p=0.9),
    )


study = RunsStudy(
    name='infinity',
    folder='runs/bits_shared',
    tokenizers=tuple((f'{bits}-bits', tokenizer(bits)) for bits in (9, 8, 16, 32)),
    contenders=(
        Contender(name='bits-9', run=run(9), tokenizer='9-bits'),
        Contender(name='index-512', run=run(9, indexed=True), tokenizer='9-bits', indexed=True),
        Contender(name='bits-9-corrected', run=run(9, strength=0.3), tokenizer='9-bits'),
        Contender(name='bits-8', run=run(8), tokenizer='8-bits'),
        Contender(name='bits-16', run=run(16), tokenizer='16-bits'),
        Contender(name='bits-32', run=run(32), tokenizer='32-bits'),
    ),
)
