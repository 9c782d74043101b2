"""Which families and tokenizers can a model folder hold?"""

from star_jax.families.star import Star
from star_jax.tokenizers.residual_vq import VQ

FAMILIES = {'star': Star}
TOKENIZERS = {'VQ': VQ}
