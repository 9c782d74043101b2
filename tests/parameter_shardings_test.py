"""How is every parameter of every published model sharded?

`parameter_shardings.txt` lists it, for readers too. Write it again after an intended change:

    STAR_JAX_WRITE=1 python -m pytest tests/parameter_shardings_test.py
"""

import os
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
from flax import linen as nn

from star_jax.families.infinity import Infinity
from star_jax.families.star import Refinement, Star
from star_jax.families.var import Var
from star_jax.parallel import rules
from star_jax.parallel.mesh import MeshShape
from star_jax.text import clip, t5
from star_jax.text.tokens import pad
from star_jax.text.tower import Tower
from star_jax.tokenizers.residual_bsq import BSQ
from star_jax.tokenizers.residual_vq import VQ

LISTING = pathlib.Path(__file__).parent / 'parameter_shardings.txt'
HEADER = """\
# Every parameter, its shape, its logical axes (-: none), and behind the arrow the mesh axes that
# split them (-: not split). Written by tests/parameter_shardings_test.py.
"""
CLIP = {
    'hidden_size': 1024,
    'num_hidden_layers': 23,
    'num_attention_heads': 16,
    'intermediate_size': 4096,
}
T5 = {
    'd_model': 2048,
    'num_layers': 24,
    'num_heads': 32,
    'd_ff': 5120,
    'feed_forward_proj': 'gated-gelu',
}


def abstract_tower(tower: Tower) -> dict:
    return jax.eval_shape(tower.module.init, jax.random.key(0), pad([], 1, 8, 0))['params']


def models() -> dict[str, Any]:
    """Abstract parameters of the published models."""
    return {
        'STAR d16, 256 px, with a refinement head': Star(refinement=Refinement()).abstract(),
        'STAR d16 with a modulation shared by all layers': Star(shared_adaln=True).abstract(),
        'VAR d16, a modulation per layer': Var.published(16).abstract(),
        'VAR d16, a modulation shared by all layers': Var.published(
            16, shared_adaln=True
        ).abstract(),
        'Infinity 125M, 256 px': Infinity().abstract(),
        'tokenizer': VQ().abstract(),
        'tokenizer of Infinity, 32 bits': BSQ().abstract(),
        'CLIP of Stable Diffusion 2.1': abstract_tower(clip.build_tower(CLIP)),
        'T5 v1.1 XL': abstract_tower(t5.build_tower(T5)),
    }


def lines(boxed: Any, mesh: jax.sharding.Mesh) -> Iterator[str]:
    """One line per parameter."""
    params = rules.abstract(boxed, mesh)
    specs = jax.tree.leaves(nn.get_partition_spec(boxed))
    for (path, leaf), spec in zip(jax.tree.leaves_with_path(params), specs, strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator='/')
        logical, split = (
            ' '.join(axis or '-' for axis in axes) for axes in (spec, leaf.sharding.spec)
        )
        yield f'{name:<37} {str(leaf.shape):<23} {logical:<23} -> {split}'


def test_parameters_have_the_listed_shardings():
    mesh = MeshShape(data=2, fsdp=2, tensor=2).build()
    sections = (
        '\n'.join(['', title, '', *lines(boxed, mesh), '']) for title, boxed in models().items()
    )
    text = HEADER + ''.join(sections)
    if os.environ.get('STAR_JAX_WRITE'):
        LISTING.write_text(text)
    assert text == LISTING.read_text()
