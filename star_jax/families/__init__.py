"""Which families and tokenizers can a model folder hold?"""

from star_jax.families.star import Star
from star_jax.tokenizers.residual_vq import VQ

FAMILIES = {'star': Star}
Family = Star  # of any of them, as a config
TOKENIZERS = {'VQ': VQ}


def family_name(config: Family) -> str:
    """The name under which a model folder knows the family of a config."""
    return next(name for name, kind in FAMILIES.items() if isinstance(config, kind))
