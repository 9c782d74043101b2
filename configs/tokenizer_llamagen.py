"""LlamaGen's VQ-16 tokenizer at 256 px: 40 epochs of ImageNet (LlamaGen specification 1.1 and 1.7).

Replace the path. What differs from the published recipe: crops come from the central square of an
image, which is first resized to 1.25 times their size, statistics of the discriminator are those of
the whole batch, LPIPS has no dropout (item 11 of LlamaGen specification 7), and in a fresh network
residual branches end with zeros. By text, the published tokenizer is this one, trained on with
`--init FOLDER --objective.adversary.start 0`; here the discriminator then starts untrained.
"""

from star_jax.data.crops import RandomCrops
from star_jax.data.prepared import Prepared
from star_jax.data.resizing import HalvedBicubic
from star_jax.nn.discriminators import PatchGAN
from star_jax.tokenizers.raster_vq import RasterVQ
from star_jax.training.objective import PUBLISHED_OPTIMIZER, Adversary, Objective
from star_jax.training.run import Pace, TokenizerRun

run = TokenizerRun(
    model=RasterVQ(),  # 1.1: 16,384 codes of width 8, 71,883,403 parameters
    data=Prepared(path='sets/imagenet', resizing=HalvedBicubic()),  # 1.7
    crops=RandomCrops(enlarge=1.25, least=1.0),  # 1.7: up to the size over 0.8
    flip=0.5,  # 1.7
    validation=Prepared(path='', split='validation', resizing=HalvedBicubic()),
    objective=Objective(
        l1=0.0,
        l2=1.0,  # 1.7: the reconstruction loss is l2, weight 1
        edges=0.0,
        perceptual=1.0,  # 1.7
        quantiser=1.0,  # 1.5: the codebook term has weight 1
        commitment=0.25,  # 1.1: beta
        adversary=Adversary(
            discriminator=PatchGAN(width=64, layers=3),  # 1.6
            generator_loss='hinge',  # 1.7
            discriminator_loss='hinge',  # 1.7
            weight=0.5,  # 1.7: disc_weight
            start=20_000,  # 1.7: disc_start
            adaptive=False,  # 1.6: the script never switches it on
            optimizer=PUBLISHED_OPTIMIZER,  # 1.7
        ),
    ),
    optimizer=PUBLISHED_OPTIMIZER,  # 1.7: Adam, 1e-4 constant, betas (0.9, 0.95), norm 1, no decay
    pace=Pace(steps=400_365, log=100, sample=5_000, save=5_000),  # 40 x 1,281,167 / 128
    batch=128,  # 1.7
    plain_steps=0,  # the codebook starts at random: 1.5
    restart_until=0.0,  # no code is restarted: 1.5
    ema=0.0,  # 1.7: off by default
    dtype='bfloat16',  # 1.7
)
