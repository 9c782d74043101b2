"""The families and tokenizers of this package, registered under the names that folders use."""

from star_jax.families.infinity import Infinity
from star_jax.families.llamagen import LlamaGen, LlamaGenText
from star_jax.families.registry import register_family, register_tokenizer
from star_jax.families.star import Star
from star_jax.families.var import Var
from star_jax.tokenizers.raster_vq import RasterVQ
from star_jax.tokenizers.residual_bsq import BSQ
from star_jax.tokenizers.residual_vq import VQ

register_family('star', Star)
register_family('var', Var)
register_family('infinity', Infinity)
register_family('llamagen', LlamaGen)
register_family('llamagen_text', LlamaGenText)
register_tokenizer('VQ', VQ)
register_tokenizer('BSQ', BSQ)
register_tokenizer('RasterVQ', RasterVQ)
