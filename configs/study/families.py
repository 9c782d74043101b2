"""Three families under equal conditions: STAR, bits as of Infinity, a raster as of LlamaGen.

Scenes of one and two shapes at 64 px, the same captions and text encoder. The transformers have the
same number of parameters within 1.1 %, and their trainings the same arithmetic within 0.2 %.
Commands, what is equal and what is not: docs/families.md.
"""

import dataclasses

from star_jax.core.schedule import square_grids
from star_jax.core.settings import Settings
from star_jax.core.templates import Templates
from star_jax.data.shapes import Shapes
from star_jax.families.infinity import Infinity
from star_jax.families.llamagen import LlamaGenText
from star_jax.families.star import Star
from star_jax.losses.tokenizer import EntropyOfBits
from star_jax.nn.positions import NormalisedRotary
from star_jax.protocols import Family, TokenizerConfig
from star_jax.studies.runs import Contender, RunsStudy
from star_jax.tokenizers.autoencoder import Autoencoder
from star_jax.tokenizers.raster_vq import RasterVQ
from star_jax.tokenizers.residual_bsq import BSQ
from star_jax.tokenizers.residual_vq import VQ
from star_jax.training.objective import Objective
from star_jax.training.optimizer import AdamW
from star_jax.training.run import Pace, Run, TokenizerRun
from star_jax.training.schedules import LearningRate

GRIDS = square_grids((1, 2, 4, 8))
SEEDS = (0, 1, 2)
TRAIN = Shapes(count=40_000, objects=(1, 2))
VALIDATION = Shapes(count=512, split='validation', objects=(1, 2))
AUTOENCODER = Autoencoder(
    width=48, multipliers=(1, 2), blocks=1, groups=16, stem=4, attention=False
)
INDEX = {'codes': 512, 'channels': 16}  # nine bits a token, as in the tokenizer of bits
CODEBOOK = {'plain_steps': 1_000, 'restart_every': 100}  # as of configs/shapes_tokenizer.py
WEIGHTS = (0.5, 1.0, 2.0)  # of guidance at the last step: 0 is none
TOP_P = (0.6, 0.9)


def tokenizer(model: TokenizerConfig, **fields: object) -> TokenizerRun:
    """The training of a tokenizer; that of bits is `9-bits` of configs/study/infinity.py."""
    return TokenizerRun(
        model=model,
        data=dataclasses.replace(TRAIN, count=200_000),
        validation=VALIDATION,
        optimizer=AdamW(
            learning_rate=LearningRate(peak=1e-3, warmup_steps=200, end=0.02, shape='lin'),
            weight_decay=0.0,
        ),
        pace=Pace(steps=10_000, log=100, sample=2_000, save=500),
        batch=8,
        ema=0.999,
        **fields,
    )


def contender(
    name: str, tokenizer: str, model: Family, steps: int, off: float, **fields: object
) -> Contender:
    """A family with its tokenizer; guidance `off` is none in its published numbers."""
    run = Run(
        model=model,
        data=TRAIN,
        validation=VALIDATION,
        optimizer=AdamW(learning_rate=LearningRate(peak=2e-3, warmup_steps=40, shape='lin')),
        pace=Pace(steps=steps, log=steps // 50, save=steps // 10, keep=1),
        batch=16,
        unroll=model.depth,
        **fields,
    )
    choices = tuple(
        Settings(guidance=off + weight, top_k=0, top_p=top_p)
        for weight in WEIGHTS
        for top_p in TOP_P
    )
    return Contender(name=name, run=run, tokenizer=tokenizer, seeds=SEEDS, choices=choices)


study = RunsStudy(
    name='families',
    folder='runs/bits_shared',  # shared with configs/study/infinity.py: one tokenizer serves both
    tokenizers=(
        ('scales', tokenizer(VQ(autoencoder=AUTOENCODER, grids=GRIDS, **INDEX), **CODEBOOK)),
        (
            '9-bits',
            tokenizer(
                BSQ(autoencoder=AUTOENCODER, grids=GRIDS, bits=9),
                objective=Objective(commitment=0.25, entropy=EntropyOfBits(weight=0.01)),
                plain_steps=0,
            ),
        ),
        (
            'raster',
            tokenizer(RasterVQ(autoencoder=AUTOENCODER, grid=GRIDS[-1], **INDEX), **CODEBOOK),
        ),
    ),
    contenders=(
        contender(
            'star',
            'scales',
            Star(
                depth=3,
                width=144,
                heads=4,
                sides=(1, 2, 4, 8),
                text_width=384,
                positions=NormalisedRotary(theta=100, extent=32),
                **INDEX,
            ),
            steps=6_250,
            off=0.0,
        ),
        contender(
            'bits',
            '9-bits',
            Infinity(
                depth=3,
                width=144,
                heads=4,
                drop_path=0.0,
                bits=9,
                grids=GRIDS,
                reference=GRIDS[-1],
                templates=Templates(),
                text_width=384,
                text_rows=32,
            ),
            steps=6_250,
            off=1.0,
            balance=0.5,
        ),
        contender(
            'raster',
            'raster',
            LlamaGenText(
                depth=5,
                width=144,
                heads=4,
                hidden=328,
                grid=GRIDS[-1],
                text_width=384,
                text_rows=24,  # the longest caption has 23 tokens
                cleaning='none',
                row_dropout=0.0,
                dropout=0.0,
                **INDEX,
            ),
            steps=5_250,
            off=1.0,
        ),
    ),
)
