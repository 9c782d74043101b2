"""The published VAR-d20 at 256 px (STAR specification 11): 250 epochs of ImageNet.

Replace the paths as in var_d16.py.
"""

from star_jax.core.settings import Settings
from star_jax.data.crops import RandomCrops
from star_jax.data.prepared import Prepared
from star_jax.families.var import Var
from star_jax.training.optimizer import AdamW
from star_jax.training.run import Pace, Run
from star_jax.training.schedules import LearningRate

run = Run(
    model=Var(
        depth=20,
        width=1280,
        heads=20,
        drop_path=0.1 * 20 / 24,
        gate_init=1e-3,
    ),
    tokenizer='models/published_tokenizer',
    data=Prepared(path='sets/imagenet'),
    crops=RandomCrops(enlarge=1.125),
    validation=Prepared(path='', split='validation'),
    optimizer=AdamW(
        learning_rate=LearningRate(
            peak=1e-4 * 768 / 256, warmup_steps=8_341, end=0.1, shape='lin0'
        ),
        weight_decay=0.05,
    ),
    pace=Pace(steps=417_046, log=100, sample=5_000, save=2_000),
    batch=768,
    caption_drop=0.1,
    dtype='bfloat16',
    sampling=Settings(guidance=1.5, top_k=900, top_p=0.96),
)
