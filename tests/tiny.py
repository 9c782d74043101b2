"""The smallest runs that are whole: 16 px, 21 tokens in three scales, two layers."""

from pathlib import Path

import jax
import numpy as np
from flax import linen as nn

from star_jax.checkpoint import folder
from star_jax.core.schedule import square_grids
from star_jax.data.shapes import Shapes
from star_jax.families.star import Star
from star_jax.text.encoder import load as load_text
from star_jax.tokenizers.autoencoder import Autoencoder
from star_jax.tokenizers.residual_vq import VQ
from star_jax.training.optimizer import AdamW
from star_jax.training.run import Pace, Run, TokenizerRun
from star_jax.training.schedules import LearningRate

TEXT = str(Path(__file__).parent / 'golden' / 'tiny_bert')
OPTIMIZER = AdamW(learning_rate=LearningRate(peak=1e-2, warmup_steps=5))
DATA = Shapes(count=48, objects=(1,), phrasings=1)
VALIDATION = Shapes(count=12, objects=(1,), split='validation')

TOKENIZER = TokenizerRun(
    model=VQ(
        autoencoder=Autoencoder(width=8, multipliers=(1,), blocks=1, groups=4, stem=4),
        grids=square_grids((1, 2, 4)),
        codes=32,
        channels=4,
    ),
    data=DATA,
    validation=VALIDATION,
    optimizer=OPTIMIZER,
    pace=Pace(steps=6, log=1, sample=100, save=3),
    batch=8,
    plain_steps=2,
    restart_every=2,
)
STAR = Run(
    model=Star(depth=2, width=32, heads=2, sides=(1, 2, 4), codes=32, channels=4, text_width=32),
    text=TEXT,
    data=DATA,
    validation=VALIDATION,
    optimizer=OPTIMIZER,
    pace=Pace(steps=6, log=1, sample=100, save=3),
    batch=8,
)


def write_tokenizer(path: Path) -> str:
    """A model folder with an untrained tokenizer; its place, as a run names it."""
    folder.write(path, folder.StoredTokenizer(config=TOKENIZER.model, params=tokenizer_params()))
    return str(path)


def write_model(path: Path, model: Star = STAR.model) -> str:
    """A model folder with an untrained model, by default of STAR's sizes; its place."""
    content = folder.StoredModel(
        config=model,
        params=random_params(model.abstract()),
        tokenizer=folder.StoredTokenizer(config=TOKENIZER.model, params=tokenizer_params()),
        text=folder.TextEncoderReference(**load_text(TEXT).reference()),
    )
    folder.write(path, content)
    return str(path)


def tokenizer_params() -> dict:
    """The parameters of an untrained tokenizer."""
    return random_params(TOKENIZER.model.abstract())


def random_params(abstract: dict) -> dict:
    """Random parameters of these shapes, made without compiling anything."""
    random = np.random.default_rng(0)

    def sample(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if leaf.ndim == 1:
            return np.full(leaf.shape, path[-1].key == 'scale', np.float32)
        sampled = random.normal(size=leaf.shape) / np.prod(leaf.shape[:-1]) ** 0.5
        return sampled.astype(np.float32)

    return jax.tree_util.tree_map_with_path(sample, nn.unbox(abstract))
