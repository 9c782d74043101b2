"""What does drawing an image cost?

One program from encoded text to pixels, as the pipeline has it, and before it the text encoder.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from star_jax.bench.case import Case, Piece, invent
from star_jax.checkpoint import models
from star_jax.core.buckets import Buckets, choose
from star_jax.core.condition import Condition, TextCondition
from star_jax.core.flops import count_flops
from star_jax.core.settings import Dtype, Settings
from star_jax.families import Family
from star_jax.nn.kernels import ByScale
from star_jax.sampling import program, stable
from star_jax.text import TextEncoder
from star_jax.text.encoder import TOWERS, read_states
from star_jax.text.published import PUBLISHED
from star_jax.text.tokens import pad
from star_jax.tokenizers.autoencoder import Autoencoder
from star_jax.tokenizers.residual_vq import VQ, VQTokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """What is drawn: random weights of these sizes, or those of a model `folder`.

    Text is random too: `text_tokens` states of the model's text width, as that encoder of
    `PUBLISHED` makes them that has it. `batch` images per run of the program, whose scales share
    `buckets` (by default those that suit the platform), `repeats` timed runs.
    """

    model: Family
    autoencoder: Autoencoder = Autoencoder()
    folder: str = ''
    settings: Settings = Settings()
    batch: int = 1
    repeats: int = 10
    dtype: Dtype = 'float32'
    buckets: Buckets | None = None
    text_tokens: int = 77

    def __post_init__(self) -> None:
        if min(self.batch, self.repeats, self.text_tokens) < 1:
            raise ValueError(
                f'batch, repeats and text_tokens must be at least 1, not {self.batch}, '
                f'{self.repeats} and {self.text_tokens}'
            )

    @property
    def tokenizer(self) -> VQ:
        """The tokenizer whose weights are random."""
        return VQ(
            autoencoder=self.autoencoder,
            grids=self.model.schedule.grids,
            codes=self.model.codes,
            channels=self.model.channels,
        )

    def prepare(self) -> Case:
        """Everything on the default device."""
        network = self.model.build(self.dtype)
        counted = self.model.build(self.dtype, attend=ByScale())  # no kernel hides its work
        tokenizer, params = self._load() if self.folder else self._invent()
        params = program.cast(params, self.dtype)
        unprompted = condition(self.model, 1, self.text_tokens) if self.settings.guidance else None
        keys_B = program.image_keys(range(self.batch))
        drawn = stable.arguments(self.settings, network, tokenizer.codes)
        args = (
            params,
            keys_B,
            condition(self.model, self.batch, self.text_tokens),
            unprompted,
            *drawn,
        )
        shared = choose(self.buckets, network.schedule.sizes, jax.default_backend())
        canvas = jnp.zeros((self.batch, *self.model.schedule.grids[-1], self.model.channels))
        decode = jax.jit(lambda params, canvas: tokenizer.apply(params, canvas, method='decode'))
        return Case(
            whole=Piece(
                program.compile_program(network, tokenizer, shared),
                args,
                count_flops(program.compile_program(counted, tokenizer), *args),
            ),
            parts={'decoder': Piece.counted(decode, {'params': params['tokenizer']}, canvas)},
            rest='scales',
            before=self._encoder,
            weights=params,
            images=self.batch,
            pixels=max(tokenizer.resolution),
        )

    def _load(self) -> tuple[VQTokenizer, dict[str, Any]]:
        """The tokenizer of a model folder, and the weights of both."""
        model = models.read(self.folder)
        params = {'model': model.params, 'tokenizer': model.tokenizer.params}
        return model.tokenizer.config.at(self.model.schedule).build(self.dtype), jax.device_put(
            params
        )

    def _invent(self) -> tuple[VQTokenizer, dict[str, Any]]:
        """The published tokenizer at the sizes of the job, and random weights of both."""
        params = {'model': self.model.abstract(), 'tokenizer': self.tokenizer.abstract()}
        return self.tokenizer.build(self.dtype), invent(nn.unbox(params))

    def _encoder(self) -> dict[str, Piece]:
        """What turns the captions of a batch into features, where a known encoder has the width."""
        if self.model.PROMPT == 'label' or self.model.text_width not in PUBLISHED:
            return {}
        fields = PUBLISHED[self.model.text_width]
        tower = TOWERS[fields['model_type']](fields)
        tokens = pad([[1] * self.text_tokens] * self.batch, self.batch, self.text_tokens, 0)
        shapes = jax.eval_shape(tower.module.init, jax.random.key(0), tokens)['params']
        encode = jax.jit(lambda params, tokens: read_states(tower, tower.pool, params, tokens))
        return {'text': Piece.counted(encode, invent(nn.unbox(shapes)), tokens)}


def condition(model: Family, rows: int, text_tokens: int) -> Condition:
    """Classes, or random features of captions that use all of their tokens."""
    if model.PROMPT == 'label':
        return model.prompt_encoder(_no_text).encode(['0'] * rows)
    shape = (rows, text_tokens, model.text_width)
    states = np.random.default_rng(1).standard_normal(shape, np.float32)
    mask = jnp.ones((rows, text_tokens), jnp.int32)
    return TextCondition(jnp.asarray(states), mask, jnp.asarray(states.mean(1)))


def _no_text() -> TextEncoder:
    raise LookupError('text is random here')
