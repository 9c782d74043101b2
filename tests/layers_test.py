"""Do layers compute the same from kernels that are stored with their outputs first?"""

import jax
import numpy as np
import pytest
from flax import linen as nn

from star_jax.nn.attention import OutputProjection
from star_jax.nn.layers import OUTPUTS_FIRST, Einsum, Linear

INIT = nn.initializers.normal(1.0)
# A layer, its rows, and how many axes of its kernel are summed.
LAYERS = {
    'einsum': (Einsum('BLD,DNH->BLNH', (6, 2, 5), ('embed', 'heads', None), INIT), (2, 3, 6), 1),
    'linear': (Linear(6, 5, ('embed', 'mlp'), INIT), (2, 3, 6), 1),
    'projection': (OutputProjection(5, (2, 3), INIT), (2, 3, 2, 3), 2),
}


@pytest.mark.parametrize('name', LAYERS)
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_kernel_with_its_outputs_first_computes_the_same(name, dtype):
    layer, shape, summed = LAYERS[name]
    x = np.random.default_rng(0).normal(size=shape).astype(dtype)
    params = nn.unbox(layer.init(jax.random.key(1), x))['params']
    kernel = params.pop('kernel')
    axes = range(kernel.ndim)
    arranged = params | {OUTPUTS_FIRST: kernel.transpose(*axes[summed:], *axes[:summed])}
    expected = layer.apply({'params': params | {'kernel': kernel}}, x)
    actual = jax.jit(layer.apply)({'params': arranged}, x)
    assert actual.dtype == expected.dtype
    tolerance = 1e-5 if dtype == 'float32' else 0.05
    np.testing.assert_allclose(actual.astype('float32'), expected.astype('float32'), atol=tolerance)
