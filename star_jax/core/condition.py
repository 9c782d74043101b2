"""What is an image conditioned on?"""

import flax.struct
import jax


@flax.struct.dataclass
class Text:
    """Encoded captions, as a frozen text encoder gives them.

    `states_BTE`: token states, zero where the mask is 0. `mask_BT`: int32, 1 for real tokens.
    `pooled_BE`: one vector per caption.
    """

    states_BTE: jax.Array
    mask_BT: jax.Array
    pooled_BE: jax.Array
