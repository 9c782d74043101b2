"""Makes an image of held-out images above their reconstructions by several tokenizers.

python docs/tokenizer_rows.py sets/emoji docs/emoji_tokenizers.png \
  plain=runs/emoji_tokenizer/model adversarial=runs/emoji_tokenizer_gan/model
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from star_jax import image_io
from star_jax.checkpoint import models
from star_jax.core import pixels
from star_jax.data import pipeline
from star_jax.data.prepared import Prepared
from star_jax.nn.bind import bind

IMAGES = 12


def main(dataset: str, out: Path, split: str, tokenizers: Sequence[str]) -> None:
    named = [entry.partition('=')[::2] for entry in tokenizers]
    loaded = {name: models.read_tokenizer(folder) for name, folder in named}
    resolution = next(iter(loaded.values())).config.resolution
    shown = pipeline.evenly_spaced(Prepared(path=dataset, split=split).open(resolution), IMAGES)
    images, captions = list(shown['image']), list(shown['caption'])
    for name, tokenizer in loaded.items():
        network = tokenizer.config.build()
        reconstructed = bind(network, tokenizer.params)(pixels.to_signed(shown['image']))
        images += list(np.asarray(network.to_uint8(reconstructed)))
        captions += [name] * IMAGES
    image_io.save_png(image_io.grid(images, captions, columns=IMAGES), out)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('dataset', help='prepared dataset')
    parser.add_argument('out', type=Path, help='PNG file')
    parser.add_argument('tokenizers', nargs='+', metavar='NAME=FOLDER', help='tokenizers')
    parser.add_argument('--split', default='held_out_labels', help='split of the dataset')
    options = parser.parse_args()
    main(options.dataset, options.out, options.split, options.tokenizers)
