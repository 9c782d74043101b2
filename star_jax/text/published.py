"""How large are the text encoders of published models, for who has none of them at hand?"""

from collections.abc import Mapping
from typing import Any

# What their config.json says, by the width of their states: OpenCLIP ViT-H/14 as in Stable
# Diffusion 2.1 (STAR), flan-t5-xl, and MiniLM, which the shipped weights are told their captions
# by.
PUBLISHED: Mapping[int, Mapping[str, Any]] = {
    1024: {
        'model_type': 'clip_text_model',
        'hidden_size': 1024,
        'intermediate_size': 4096,
        'num_attention_heads': 16,
        'num_hidden_layers': 23,
        'hidden_act': 'gelu',
    },
    2048: {
        'model_type': 't5',
        'd_model': 2048,
        'd_ff': 5120,
        'd_kv': 64,
        'num_heads': 32,
        'num_layers': 24,
        'feed_forward_proj': 'gated-gelu',
    },
    384: {
        'model_type': 'bert',
        'hidden_size': 384,
        'intermediate_size': 1536,
        'num_attention_heads': 12,
        'num_hidden_layers': 6,
    },
}
