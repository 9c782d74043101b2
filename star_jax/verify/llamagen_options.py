"""Which options may a recorded case of LlamaGen have, and how exact must it be?

The cases carry no tolerances: the marks are the suggested ones of the README beside them.
"""

from collections.abc import Mapping

from star_jax.verify.comparison import (
    BYTES,
    FUNCTIONS,
    GRADIENTS,
    GUIDED_LOGITS,
    HIDDEN,
    LOGITS,
    OBJECTIVES,
    QUANTISER_GRADIENTS,
    TABLES,
    TOKENIZED,
)
from star_jax.verify.options import Options

MARKS: Mapping[str, float] = {
    LOGITS: 5e-5,
    GUIDED_LOGITS: 2e-4,
    HIDDEN: 1e-4,
    OBJECTIVES: 2e-5,
    GRADIENTS: 5e-5,
    TOKENIZED: 3e-5,
    QUANTISER_GRADIENTS: 2e-3,  # the entropy at a temperature of 0.01 amplifies rounding
    FUNCTIONS: 1e-5,
    TABLES: 1e-5,
    BYTES: 1,
}

ANY = ('family', 'kind')
DESCRIPTIVE = ('_meta', 'seed')

OPTIONS: Mapping[str, Options] = {
    'postprocess': Options(read=(*ANY, 'sizes'), descriptive=DESCRIPTIVE),
}
