"""Fine-tunes the shipped transformer on your own images: a folder of images with captions.

star-jax train configs/own_images.py --data.path my_images --out runs/mine

The caption of cat.png is in cat.txt beside it, or in a metadata.jsonl; a tenth of the images is the
validation split. 300 steps memorise about twenty images; for many more images raise `--pace.steps`.
To generalise to other images, watch the validation loss in metrics.jsonl.
"""

from star_jax import files
from star_jax.checkpoint import models
from star_jax.core.settings import Settings
from star_jax.data.folder import Folder
from star_jax.training.optimizer import AdamW
from star_jax.training.run import Pace, Run
from star_jax.training.schedules import LearningRate

run = Run(
    model=models.read(files.SHIPPED).config,
    init=files.SHIPPED,
    data=Folder(path='my_images'),
    validation=Folder(split='validation'),
    optimizer=AdamW(learning_rate=LearningRate(peak=5e-4, warmup_steps=20, shape='lin')),
    pace=Pace(steps=300, log=10, sample=100, save=100),
    batch=16,
    unroll=4,
    sampling=Settings(guidance=1.0, top_k=5, top_p=0.9),
)
