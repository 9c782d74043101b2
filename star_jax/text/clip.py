"""How does the text tower of CLIP encode a caption?

Source: Radford et al. 2021; tensor names and the order of operations follow transformers'
`CLIPTextModel`, the text encoder of Stable Diffusion. The states are the output of the last layer
after the final norm (the folder of Stable Diffusion 2.1 has 23 of OpenCLIP's 24 layers). The pooled
vector is the state at the end of the text, without projection (STAR specification 2).
"""

import functools
from collections.abc import Container, Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn

from star_jax.errors import UserError
from star_jax.text import hf_config, layers
from star_jax.text.tokens import Tokens
from star_jax.text.tower import StateOfHighestId, StateOfToken, Tower
from star_jax.text.weights import WeightMapping, affine, fused, fused_bias, stacked

# The end id in configs of old transformers, which is not the id that ends a text of CLIP.
WRONG_END_ID = 2


class Block(nn.Module):
    """Attention and MLP, each after its norm (pre-norm).

    Attributes:
        heads: attention heads.
        mlp: channels inside the MLP.
        eps: added to the variance of a norm.
        activation: activation of the MLP.
    """

    heads: int
    mlp: int
    eps: float
    activation: layers.Activation

    @nn.compact
    def __call__(self, x_BTE: jax.Array, visible: jax.Array) -> tuple[jax.Array, None]:
        h_BTE = layers.LayerNorm(self.eps, name='attention_norm')(x_BTE)
        x_BTE = x_BTE + layers.SelfAttention(self.heads, name='attention')(h_BTE, visible)
        h_BTE = layers.LayerNorm(self.eps, name='mlp_norm')(x_BTE)
        return x_BTE + layers.Mlp(self.mlp, self.activation, name='mlp')(h_BTE), None


class Clip(nn.Module):
    """Tokens to states [B, T, E]; attention is causal, over real tokens.

    Attributes:
        vocab: number of token ids.
        positions: rows of the position table, the most tokens of a caption.
        width: channels E of a state.
        depth: layers.
        heads: attention heads of a layer.
        mlp: channels inside the MLP.
        eps: added to the variance of a norm.
        activation: activation of the MLP.
    """

    vocab: int
    positions: int
    width: int
    depth: int
    heads: int
    mlp: int
    eps: float
    activation: layers.Activation

    @nn.compact
    def __call__(self, tokens: Tokens) -> jax.Array:
        positions_T = jnp.arange(tokens.ids_BT.shape[1])
        x_BTE = layers.embedding(self.vocab, self.width, 'words')(tokens.ids_BT)
        x_BTE = x_BTE + layers.embedding(self.positions, self.width, 'positions')(positions_T[None])
        causal_11TS = (positions_T[:, None] >= positions_T[None, :])[None, None]
        blocks = layers.stack(
            Block,
            depth=self.depth,
            heads=self.heads,
            mlp=self.mlp,
            eps=self.eps,
            activation=self.activation,
        )
        x_BTE, _ = blocks(x_BTE, layers.visible_tokens(tokens.mask_BT) & causal_11TS)
        return layers.LayerNorm(self.eps, name='norm')(x_BTE)


def build_tower(config: Mapping) -> Tower:
    """The encoder of a config.json.

    Absent fields have the defaults of transformers' CLIPTextConfig. The config of a whole CLIP
    contains that of its text tower. Raises `UserError` for invalid values.
    """
    config = _text_config(config)
    width = hf_config.size(config, 'hidden_size', 512)
    module = Clip(
        vocab=hf_config.size(config, 'vocab_size', 49408),
        positions=hf_config.size(config, 'max_position_embeddings', 77),
        width=width,
        depth=hf_config.depth(config, 'num_hidden_layers', 12),
        heads=hf_config.num_heads(config, width, 8),
        mlp=hf_config.size(config, 'intermediate_size', 2048),
        eps=hf_config.epsilon(config, 'layer_norm_eps', 1e-5),
        activation=hf_config.choice(config, 'hidden_act', 'quick_gelu', layers.ACTIVATIONS),
    )
    end_id = hf_config.token_id(config, 'eos_token_id', 49407)
    return Tower(
        module=module,
        weight_mappings=functools.partial(weight_mappings, module.depth),
        pool=StateOfHighestId() if end_id == WRONG_END_ID else StateOfToken(end_id),
        width=width,
        vocab=module.vocab,
        pad_id=hf_config.token_id(config, 'pad_token_id', 1),
        default_length=module.positions,
        max_length=module.positions,
    )


def weight_mappings(depth: int, names: Container[str]) -> list[WeightMapping]:
    """The mappings of a folder whose tensors have these names, without a vision tower."""
    prefix = 'text_model.' if 'text_model.final_layer_norm.weight' in names else ''
    heads = [f'self_attn.{name}_proj' for name in 'qkv']
    layer = [
        *affine('layer_norm1', 'attention_norm', 'E -> E', kernel='scale'),
        *fused(heads, 'attention/qkv'),
        *fused_bias(heads, 'attention/qkv_bias'),
        *affine('self_attn.out_proj', 'attention/out', 'E (N H) -> N H E'),
        *affine('layer_norm2', 'mlp_norm', 'E -> E', kernel='scale'),
        *affine('mlp.fc1', 'mlp/up', 'F E -> E F'),
        *affine('mlp.fc2', 'mlp/down', 'E F -> F E'),
    ]
    embeddings = f'{prefix}embeddings'
    return [
        WeightMapping(f'{embeddings}.token_embedding.weight', 'words/table', 'V E -> V E'),
        WeightMapping(f'{embeddings}.position_embedding.weight', 'positions/table', 'T E -> T E'),
        *stacked(f'{prefix}encoder.layers', layer, depth),
        *affine(f'{prefix}final_layer_norm', 'norm', 'E -> E', kernel='scale'),
    ]


def _text_config(config: Mapping) -> Mapping:
    """The fields of the text tower; of both entries in old files, transformers reads the second."""
    if config.get('model_type') != 'clip':
        return config
    text = config.get('text_config_dict') or config.get('text_config') or {}
    if not isinstance(text, Mapping):
        raise UserError(
            f'text_config is {text!r} in the text encoder; expected an object of fields.'
        )
    return text
