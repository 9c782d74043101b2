"""How does BERT (and MiniLM, a small BERT) read a caption?

Source: Devlin et al. 2018; the tensors' names and the order of operations are those of
transformers' `BertModel`. Its pooler is not used: the pooled vector is the mean of the real
tokens, as MiniLM was trained.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from star_jax.core.sizes import LARGEST
from star_jax.errors import UserError
from star_jax.text.layers import Embedding, LayerNorm, Linear, attend, masked_mean
from star_jax.text.tokens import Tokens

ACTIVATIONS = {
    'gelu': lambda x: jax.nn.gelu(x, approximate=False),
    'gelu_new': lambda x: jax.nn.gelu(x, approximate=True),
    'relu': jax.nn.relu,
}


class Block(nn.Module):
    """Attention and MLP, each followed by its residual and norm (post-norm)."""

    heads: int
    mlp: int
    eps: float
    activation: str

    @nn.compact
    def __call__(self, x_BTE: jax.Array, mask_BT: jax.Array) -> tuple[jax.Array, None]:
        E, N, F = x_BTE.shape[-1], self.heads, self.mlp
        H = E // N
        axes = ('embed', None, 'heads', None)
        fused_BTKNH = Linear('BTE,EKNH->BTKNH', (E, 3, N, H), axes, 3, name='qkv')(x_BTE)
        q_BTNH, k_BTNH, v_BTNH = jnp.unstack(fused_BTKNH, axis=2)
        out = Linear('BTNH,NHE->BTE', (N, H, E), ('heads', None, 'embed'), 1, name='out')
        read_BTE = out(attend(q_BTNH, k_BTNH, v_BTNH, mask_BT))
        x_BTE = LayerNorm(self.eps, name='attention_norm')(x_BTE + read_BTE)
        up = Linear('BTE,EF->BTF', (E, F), ('embed', 'mlp'), 1, name='up')
        down = Linear('BTF,FE->BTE', (F, E), ('mlp', 'embed'), 1, name='down')
        hidden_BTF = ACTIVATIONS[self.activation](up(x_BTE))
        return LayerNorm(self.eps, name='mlp_norm')(x_BTE + down(hidden_BTF)), None


class Bert(nn.Module):
    """Tokens in; states (B, T, E) and pooled vectors (B, E) out. Fields as in config.json."""

    vocab: int
    positions: int
    types: int
    width: int
    depth: int
    heads: int
    mlp: int
    eps: float
    activation: str

    @property
    def longest(self) -> int:
        """Tokens per caption that the position table has room for."""
        return self.positions

    @nn.compact
    def __call__(self, tokens: Tokens) -> tuple[jax.Array, jax.Array]:
        at_1T = jnp.arange(tokens.ids_BT.shape[1])[None]
        x_BTE = (
            Embedding(self.vocab, self.width, name='words')(tokens.ids_BT)
            + Embedding(self.types, self.width, name='types')(jnp.zeros_like(at_1T))
            + Embedding(self.positions, self.width, name='positions')(at_1T)
        )
        x_BTE = LayerNorm(self.eps, name='norm')(x_BTE)
        layers = nn.scan(
            Block,
            variable_axes={'params': 0},
            split_rngs={'params': True},
            in_axes=nn.broadcast,
            length=self.depth,
            metadata_params={nn.PARTITION_NAME: 'layers'},
        )(self.heads, self.mlp, self.eps, self.activation, name='layers')
        states_BTE, _ = layers(x_BTE, tokens.mask_BT)
        return states_BTE, masked_mean(states_BTE, tokens.mask_BT)


def build(config: Mapping) -> Bert:
    """The module that a config.json describes; absent fields as in transformers' BertConfig.

    Raises `UserError` for variants of BERT that compute something else, and for sizes that are
    none.
    """
    activation = config.get('hidden_act', 'gelu')
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise UserError(
            f'hidden_act is {activation!r} in the text encoder; supported: {sorted(ACTIVATIONS)}.'
        )
    if (kind := config.get('position_embedding_type', 'absolute')) != 'absolute':
        raise UserError(
            f"position_embedding_type is {kind!r} in the text encoder; supported: 'absolute'."
        )
    width, heads = _size(config, 'hidden_size', 768), _size(config, 'num_attention_heads', 12)
    if width % heads:
        raise UserError(f'a text encoder of width {width} does not divide into {heads} heads.')
    eps = config.get('layer_norm_eps', 1e-12)
    if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 < eps < 1:
        raise UserError(f'layer_norm_eps is {eps!r} in the text encoder; expected one in (0, 1).')
    return Bert(
        vocab=_size(config, 'vocab_size', 30522),
        positions=_size(config, 'max_position_embeddings', 512),
        types=_size(config, 'type_vocab_size', 2),
        width=width,
        depth=_size(config, 'num_hidden_layers', 12),
        heads=heads,
        mlp=_size(config, 'intermediate_size', 3072),
        eps=eps,
        activation=activation,
    )


def _size(config: Mapping, name: str, default: int) -> int:
    """A field of the config that counts something."""
    size = config.get(name, default)
    if type(size) is not int or not 1 <= size <= LARGEST:
        raise UserError(
            f'{name} is {size!r} in the text encoder; expected a whole number in [1, {LARGEST}].'
        )
    return size


def convert(module: Bert, tensors: Mapping[str, np.ndarray]) -> dict:
    """The module's parameters from the folder's tensors, layers stacked. Raises KeyError."""
    E, N, H = module.width, module.heads, module.width // module.heads
    # A BERT that was saved inside a larger model has its name in front; a very old one says
    # gamma and beta.
    prefix = '' if 'embeddings.word_embeddings.weight' in tensors else 'bert.'
    old_norm = f'{prefix}embeddings.LayerNorm.gamma' in tensors
    scale, shift = ('gamma', 'beta') if old_norm else ('weight', 'bias')

    def norm(read, name: str) -> dict:
        return {'scale': read(f'{name}.{scale}'), 'bias': read(f'{name}.{shift}')}

    def linear(read, name: str, shape: tuple[int, ...]) -> dict:
        kernel = np.swapaxes(read(f'{name}.weight'), -1, -2)
        return {
            'kernel': kernel.reshape(*kernel.shape[:-2], *shape),
            'bias': read(f'{name}.bias'),
        }

    def one(name: str) -> np.ndarray:
        return tensors[prefix + name]

    def every(name: str) -> np.ndarray:
        names = (f'{prefix}encoder.layer.{layer}.{name}' for layer in range(module.depth))
        return np.stack([tensors[name] for name in names])

    def table(name: str) -> dict:
        return {'table': one(f'embeddings.{name}_embeddings.weight')}

    names = ('query', 'key', 'value')
    heads = [linear(every, f'attention.self.{name}', (E, N, H)) for name in names]
    return {
        'words': table('word'),
        'types': table('token_type'),
        'positions': table('position'),
        'norm': norm(one, 'embeddings.LayerNorm'),
        'layers': {
            'qkv': {
                'kernel': np.stack([head['kernel'] for head in heads], axis=2),
                'bias': np.stack([head['bias'].reshape(-1, N, H) for head in heads], axis=1),
            },
            'out': linear(every, 'attention.output.dense', (N, H, E)),
            'attention_norm': norm(every, 'attention.output.LayerNorm'),
            'up': linear(every, 'intermediate.dense', (E, module.mlp)),
            'down': linear(every, 'output.dense', (module.mlp, E)),
            'mlp_norm': norm(every, 'output.LayerNorm'),
        },
    }
