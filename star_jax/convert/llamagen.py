"""Which parameter does each published LlamaGen tensor become? (LlamaGen specification 6.2)"""

import dataclasses

from star_jax.convert.entries import Entry, layer_entries
from star_jax.convert.star import LINEAR, SAME
from star_jax.families.llamagen import Llama, LlamaGen

# Tensors of older or used files that follow from the sizes: rotary tables and emptied caches.
BUFFERS = ('freqs_cis', 'kv_cache.k_cache', 'kv_cache.v_cache')

ROWS = 'row width -> row width'
QKV = 'attention.wqkv.weight'
OUTER = (
    ('tok_embeddings.weight', 'embedder/kernel', ROWS),
    ('norm.weight', 'to_logits/norm/scale', SAME),
    ('output.weight', 'to_logits/logits/kernel', LINEAR),
)
CLASSES = (('cls_embedding.embedding_table.weight', 'starter/classes/table', ROWS),)
TEXT = (
    ('cls_embedding.uncond_embedding', 'starter/empty', ROWS),
    ('cls_embedding.cap_proj.fc1.weight', 'starter/fc1/kernel', LINEAR),
    ('cls_embedding.cap_proj.fc2.weight', 'starter/fc2/kernel', LINEAR),
)
BLOCK = (
    ('attention.wo.weight', 'attn/proj/kernel', 'd (n h) -> n h d'),
    ('feed_forward.w1.weight', 'ffn/gate/kernel', LINEAR),
    ('feed_forward.w3.weight', 'ffn/value/kernel', LINEAR),
    ('feed_forward.w2.weight', 'ffn/out/kernel', LINEAR),
    ('attention_norm.weight', 'norm1/scale', SAME),
    ('ffn_norm.weight', 'norm2/scale', SAME),
)
FUSED = ((QKV, 'attn/qkv/kernel', '(three n h) d -> d three n h'),)
QUERIES = ((QKV, 'attn/q/kernel', '(n h) d -> d n h'),)
SHARED = ((QKV, 'attn/kv/kernel', '(two k h) d -> d two k h'),)


def llamagen_entries(model: Llama) -> list[Entry]:
    """The table of a transformer.

    Where heads share keys and values, queries are the first rows of the published projection, and
    keys and values are the others.
    """
    outer = OUTER + (CLASSES if isinstance(model, LlamaGen) else TEXT)
    lengths = {'n': model.heads, 'three': 3, 'two': 2, 'k': model.kv_heads}

    def entries_of(rules: tuple, rows: tuple[int, int] | None = None) -> list[Entry]:
        entries = layer_entries(rules, 'layers', 'blocks', model.depth, lengths)
        return [dataclasses.replace(entry, rows=rows) for entry in entries]

    if model.kv_heads in (0, model.heads):
        projections = entries_of(FUSED)
    else:
        end = model.width + 2 * model.kv_heads * model.head_width
        projections = entries_of(QUERIES, (0, model.width))
        projections += entries_of(SHARED, (model.width, end))
    return [Entry(*rule) for rule in outer] + projections + entries_of(BLOCK)
