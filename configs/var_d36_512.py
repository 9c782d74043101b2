"""The published VAR-d36 at 512 px, whose blocks share one modulation: 350 epochs of ImageNet.

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
        depth=36,
        width=2304,
        heads=36,
        sides=(1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
        shared_adaln=True,
        drop_path=0.1 * 36 / 24,
        gate_init=5e-6,
    ),
    tokenizer='models/published_tokenizer',
    data=Prepared(path='sets/imagenet'),
    crops=RandomCrops(enlarge=1.125),
    validation=Prepared(path='', split='validation'),
    optimizer=AdamW(
        learning_rate=LearningRate(
            peak=8e-5 * 768 / 256, warmup_steps=11_677, end=0.01, shape='lin0'
        ),
        weight_decay=0.05,
        weight_decay_end=0.08,
    ),
    pace=Pace(steps=583_865, log=100, sample=5_000, save=2_000),
    batch=768,
    caption_drop=0.1,
    dtype='bfloat16',
    remat='full',
    sampling=Settings(guidance=1.5, top_k=900, top_p=0.96),
)
