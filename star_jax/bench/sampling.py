"""How long does sampling an image take?

The pipeline's one program from encoded text to pixels is timed, and apart from it the text encoder.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from star_jax.bench import timing
from star_jax.bench.benchmark import Benchmark, TimedProgram, random_arrays
from star_jax.checkpoint import models
from star_jax.core.buckets import Buckets, choose
from star_jax.core.flops import count_flops
from star_jax.core.settings import Dtype, Settings
from star_jax.errors import UserError
from star_jax.nn.bind import bind
from star_jax.nn.kernels import ByScale
from star_jax.nn.transformer import Transformer
from star_jax.parallel import machine
from star_jax.plan.jaxpr_memory import weights_read
from star_jax.protocols import Family, TokenizerConfig
from star_jax.sampling import program, weight_layout
from star_jax.text.encoder import TOWERS, read_states
from star_jax.text.hf_config import PUBLISHED
from star_jax.text.tokens import pad
from star_jax.tokenizers.autoencoder import Autoencoder


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingJob:
    """A model whose sampling is timed, with random text.

    Attributes:
        model: the sizes of the transformer.
        autoencoder: the sizes of the tokenizer's encoder and decoder.
        folder: a model folder whose weights are used ('': random weights).
        settings: guidance, filters and sampling method.
        batch: images per run of the program.
        repeats: timed runs.
        dtype: the compute dtype.
        buckets: scales that share a program body (None: the default of the platform).
        text_tokens: tokens of a prompt.
        text_encoder: the text encoder is timed, too, where its sizes are published.
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
    text_encoder: bool = True

    def __post_init__(self) -> None:
        if min(self.batch, self.repeats, self.text_tokens) < 1:
            raise UserError(
                f'batch, repeats and text_tokens must be at least 1, not {self.batch}, '
                f'{self.repeats} and {self.text_tokens}'
            )
        timing.check_runs('repeats', self.repeats)
        program.step_settings(self.model, self.settings)  # refuses numbers for other steps
        rows = self.text_tokens * self.model.text_width
        rows += self.model.schedule.sizes[-1] * self.model.width
        machine.check_memory(f'a batch of {self.batch:,} images', 4 * self.batch * rows)

    @property
    def steps(self) -> int:
        """The steps that are sampled."""
        return self.settings.stop or self.model.schedule.steps

    @property
    def guided(self) -> bool:
        """Whether any of them is guided, so that unprompted rows are computed, too."""
        return program.step_settings(self.model, self.settings).guided

    @property
    def tokenizer(self) -> TokenizerConfig:
        """The tokenizer of random weights, at the sizes of the model."""
        tokenizer = self.model.default_tokenizer()
        if self.autoencoder == Autoencoder():
            return tokenizer
        return dataclasses.replace(tokenizer, autoencoder=self.autoencoder)

    def prepare(self) -> Benchmark:
        """The programs and their arguments, on the default device."""
        network, tokenizer, weights = self._read()
        weights = self._put(self._arrange(weights))
        params, inputs = weight_layout.with_switched_kernels(weights), self.inputs()
        args = (params, inputs)
        buckets = choose(self.buckets, network.schedule.sizes, jax.default_backend())
        sampler = program.compile_program(network, tokenizer, buckets)
        return Benchmark(
            main=TimedProgram(sampler, args, functools.partial(self.cost, tokenizer, *args)),
            parts={'decoder': self.decoder(tokenizer, params)},
            remainder='scales',
            make_preceding=self._text_encoder,
            weights=jax.eval_shape(lambda: weights),
            images=self.batch,
            pixels=max(tokenizer.resolution),
        )

    def build(self) -> tuple[Transformer, nn.Module, dict[str, Any]]:
        """The transformer, its tokenizer, and the parameters of both on the default device."""
        network, tokenizer, params = self._read()
        return network, tokenizer, self._put(params)

    def decoder(self, tokenizer: nn.Module, params: dict[str, Any]) -> TimedProgram:
        """The decoder alone, from the canvas of every image."""
        canvas = bind(tokenizer, params['tokenizer']).blank(self.batch)
        decode = jax.jit(lambda params, canvas: bind(tokenizer, params).decode(canvas))
        return TimedProgram.of(decode, params['tokenizer'], canvas)

    def cost(
        self, tokenizer: nn.Module, params: dict[str, Any], inputs: program.SamplingInputs
    ) -> tuple[int, int]:
        """Floating-point operations of a run, and the bytes of weights and cache that it reads."""
        network = self.model.build(self.dtype, attend=ByScale())  # its operations can be counted
        counted = program.compile_program(network, tokenizer)
        reads = weights_read(counted, params, inputs)
        reads += cache_read(network, self.batch * (1 + self.guided), self.steps)
        return count_flops(counted, params, inputs), reads

    def inputs(self) -> program.SamplingInputs:
        """Random inputs of the program."""
        return program.inputs(
            self.model,
            self.settings,
            keys_B=program.image_keys(range(self.batch)),
            prompted=condition(self.model, self.batch, self.text_tokens),
            empty=condition(self.model, 1, self.text_tokens),
        )

    def arrange(self, params: dict[str, Any]) -> dict[str, Any]:
        """The parameters in the form in which a pipeline holds them on the default device."""
        return weight_layout.with_switched_kernels(self._arrange(params))

    def _arrange(self, params: dict[str, Any]) -> dict[str, Any]:
        return weight_layout.arrange(params, self.model.schedule, jax.default_backend())

    def _read(self) -> tuple[Transformer, nn.Module, dict[str, Any]]:
        """The transformer, its tokenizer, and the parameters of both in the compute dtype.

        They are numpy arrays from the model folder, or shapes, of random ones: a device holds them
        in no other dtype and form than a pipeline's.
        """
        network = self.model.build(self.dtype)
        if not self.folder:
            shapes = {'model': self.model.abstract(), 'tokenizer': self.tokenizer.abstract()}
            params = program.abstract_cast(nn.unbox(shapes), self.dtype)
            return network, self.tokenizer.build(self.dtype), params
        model = models.read(self.folder)
        params = {'model': model.params, 'tokenizer': model.tokenizer.params}
        tokenizer = model.tokenizer.config.at(self.model.schedule).build(self.dtype)
        return network, tokenizer, program.cast(params, self.dtype)

    def _put(self, params: dict[str, Any]) -> dict[str, Any]:
        """The parameters of `_read` on the default device."""
        return jax.device_put(params) if self.folder else random_arrays(params)

    def _text_encoder(self) -> dict[str, TimedProgram]:
        """The encoder of a batch of prompts, if it is timed."""
        if not self.text_encoder or self.model.text_width not in PUBLISHED:
            return {}
        encoder_config = PUBLISHED[self.model.text_width]
        tower = TOWERS[encoder_config['model_type']](encoder_config)
        tokens = pad([[1] * self.text_tokens] * self.batch, self.batch, self.text_tokens, 0)
        shapes = jax.eval_shape(tower.module.init, jax.random.key(0), tokens)['params']
        encode = jax.jit(lambda params, tokens: read_states(tower, tower.pool, params, tokens))
        return {'text': TimedProgram.of(encode, random_arrays(nn.unbox(shapes)), tokens)}


def cache_read(network: Transformer, rows: int, steps: int) -> int:
    """Bytes of keys and values that the first `steps` of sampling read, for `rows` of a batch."""
    row = jax.eval_shape(lambda: network.empty_cache(rows, 1))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(row))
    return sum(network.schedule.starts[:steps]) * size


def condition(model: Family, rows: int, text_tokens: int) -> Any:
    """Class labels, or random features of `rows` prompts of exactly `text_tokens` tokens."""
    random = np.random.default_rng(1)

    def fill(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.asarray(random.standard_normal(leaf.shape, np.float32))
        return jnp.ones(leaf.shape, leaf.dtype)  # class 1, or a mask of real tokens

    return jax.tree.map(fill, model.abstract_condition(rows, text_tokens))
