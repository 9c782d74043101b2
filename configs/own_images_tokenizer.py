"""Fine-tunes the shipped tokenizer on your own images, for colours and shapes that it lacks.

star-jax train-tokenizer configs/own_images_tokenizer.py --data.path my_images --out runs/tokenizer

The codebook keeps its codes, so that the shipped transformer can be fine-tuned on this tokenizer.
"""

from star_jax import files
from star_jax.checkpoint import models
from star_jax.data.folder import Folder
from star_jax.training.optimizer import AdamW
from star_jax.training.run import Pace, TokenizerRun
from star_jax.training.schedules import LearningRate

run = TokenizerRun(
    model=models.read_tokenizer(files.SHIPPED).config,
    init=files.SHIPPED,
    data=Folder(path='my_images'),
    validation=Folder(split='validation'),
    optimizer=AdamW(
        learning_rate=LearningRate(peak=5e-4, warmup_steps=20, shape='lin'), weight_decay=0.0
    ),
    pace=Pace(steps=600, log=20, sample=200, save=200),
    batch=8,
    plain_steps=0,
    restart_until=0.0,
)
