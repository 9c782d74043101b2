"""VAR's multi-scale tokenizer at 256 px, with a discriminator.

VAR published the tokenizer (STAR specification 1) and its kind of objective (the squared error,
LPIPS, and an adversarial loss with a discriminator of StyleGAN's type, on OpenImages), but neither
weights of the losses nor the training script. Numbers marked with a star are therefore those of
LlamaGen (LlamaGen specification 1.5 to 1.7), whose encoder and decoder are of the same kind.
Replace the path.
"""

from star_jax.data.crops import RandomCrops
from star_jax.data.prepared import Prepared
from star_jax.nn.discriminators import StyleGAN
from star_jax.tokenizers.residual_vq import VQ
from star_jax.training.objective import PUBLISHED_OPTIMIZER, Adversary, Objective
from star_jax.training.run import Pace, TokenizerRun

run = TokenizerRun(
    model=VQ(),  # STAR specification 1.1-1.7: 10 scales, 4,096 codes of width 32, four phis
    data=Prepared(path='sets/openimages'),
    crops=RandomCrops(enlarge=1.25, least=1.0),  # *
    flip=0.5,  # *
    validation=Prepared(path='', split='validation'),
    objective=Objective(
        l1=0.0,
        l2=1.0,  # VAR, equation 5
        edges=0.0,
        perceptual=1.0,  # *
        quantiser=1.0,  # VAR, equation 5
        commitment=0.25,  # STAR specification 1.8: beta
        scales='mean',  # STAR specification 1.8
        adversary=Adversary(
            discriminator=StyleGAN(),  # VAR, section 3.2
            weight=0.5,  # *
            start=20_000,  # *
            optimizer=PUBLISHED_OPTIMIZER,  # *
        ),
    ),
    optimizer=PUBLISHED_OPTIMIZER,  # *
    pace=Pace(steps=400_000, log=100, sample=5_000, save=5_000),  # *
    batch=128,  # *
    plain_steps=0,  # * the codebook starts at random
    restart_until=0.0,  # * no code is restarted
    dtype='bfloat16',  # *
)
