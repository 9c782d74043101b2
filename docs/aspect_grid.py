"""Makes an image grid of one model at three aspect ratios.

python docs/aspect_grid.py shipped/infinity docs/aspect_grid.png
"""

import argparse
from pathlib import Path

import star_jax
from star_jax import image_io

ASPECTS = ('1:1', '2:1', '1:2')
PROMPTS = ('a red circle', 'a small blue star', 'a large green ring', 'a yellow square')


def main(model: str, out: Path) -> None:
    images, captions = [], []
    for aspect in ASPECTS:
        pipe = star_jax.load(model, size=star_jax.ImageSize(aspect=aspect))
        images += list(pipe(PROMPTS))
        captions += [f'{aspect}: {prompt}' for prompt in PROMPTS]
    image_io.save_png(image_io.grid(images, captions, columns=len(PROMPTS)), out)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('model', help='model folder with templates of these ratios')
    parser.add_argument('out', type=Path, help='PNG file')
    options = parser.parse_args()
    main(options.model, options.out)
