"""Which families and tokenizers can a model folder hold?"""

from star_jax.families.star import Star
from star_jax.families.var import Var
from star_jax.tokenizers.residual_vq import VQ

FAMILIES = {'star': Star, 'var': Var}
Family = Star | Var  # of any of them, as a config
TOKENIZERS = {'VQ': VQ}


def family_name(config: Family) -> str:
    """The name under which a model folder knows the family of a config."""
    return next(name for name, kind in FAMILIES.items() if isinstance(config, kind))
