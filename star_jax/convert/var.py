"""Which parameter does each published VAR tensor become? (STAR specification 11)"""

from star_jax.convert.entries import Entry, layer_entries
from star_jax.convert.star import ADDITIVE, BLOCK, BLOCK_OFFSET, BLOCK_SCALE, LINEAR, SAME
from star_jax.families.var import Var
from star_jax.nn.positions import Learned

# Tensors of published files that follow from the sizes.
BUFFERS = ('zero_k_bias', 'lvl_1L', 'attn_bias_for_masking')

OUTER = (
    ('pos_start', 'starter/position/table', '1 row width -> row width'),
    ('class_emb.weight', 'starter/classes/table', 'label width -> label width'),
    ('word_embed.weight', 'embedder/kernel', LINEAR),
    ('word_embed.bias', 'embedder/bias', SAME),
    ('head_nm.ada_lin.1.weight', 'to_logits/modulation/kernel', LINEAR),
    ('head_nm.ada_lin.1.bias', 'to_logits/modulation/bias', SAME),
    ('head.weight', 'to_logits/logits/kernel', LINEAR),
    ('head.bias', 'to_logits/logits/bias', SAME),
)
LEVELS = (('lvl_embed.weight', 'levels', 'scale width -> scale width'),)
SHARED_ADALN = (
    ('shared_ada_lin.1.weight', 'modulator/vector/kernel', LINEAR),
    ('shared_ada_lin.1.bias', 'modulator/vector/bias', SAME),
)
BLOCK_ADALN = (
    ('ada_lin.1.weight', 'modulate/vector/kernel', LINEAR),
    ('ada_lin.1.bias', 'modulate/vector/bias', SAME),
)


def var_entries(var: Var) -> list[Entry]:
    """The table of a transformer."""
    outer = OUTER + (SHARED_ADALN if var.shared_adaln else ())
    outer += LEVELS if var.level_embedding or var.shared_adaln else ()
    outer += ADDITIVE if isinstance(var.positions, Learned) else ()
    block = BLOCK + (BLOCK_SCALE if var.qk_norm else ())
    block += BLOCK_OFFSET if var.shared_adaln else BLOCK_ADALN
    entries = [Entry(*rule) for rule in outer]
    lengths = {'n': var.heads, 'three': 3}
    return entries + layer_entries(block, 'blocks', 'blocks', var.depth, lengths)
