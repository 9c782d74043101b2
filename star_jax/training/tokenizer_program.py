"""What does a training step of a tokenizer compute?

The losses are those of STAR specification 1.8 and, with a discriminator, of LlamaGen specification
1.6. Each program serves every image size of a run.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from star_jax.core import pixels
from star_jax.losses.tokenizer import Perceptual, psnr
from star_jax.losses.tokens import Metrics
from star_jax.nn import layers
from star_jax.nn.bind import bind
from star_jax.tokenizers import codebook
from star_jax.tokenizers.scale_dropout import drop_scales
from star_jax.training.adversary import Competition
from star_jax.training.gradients import Gradients, Parts, accumulate
from star_jax.training.optimizer import gradient_norm
from star_jax.training.run import TokenizerRun
from star_jax.training.state import TrainState

LAST_KERNEL = ('decoder', 'conv_out', 'kernel')
ADVERSARY_KEY = 2**31 - 1  # folded into the seed: the parameters of the discriminator


class TokenizerForward(NamedTuple):
    """Intermediate results of a tokenizer for a training batch.

    Attributes:
        images: [B, H, W, 3] in [-1, 1].
        decoded: their reconstructions, not clamped, at least float32.
        quantised: the result of the quantiser.
        losses: the weighted losses of the quantiser, empty without it.
    """

    images: jax.Array
    decoded: jax.Array
    quantised: Any
    losses: dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TokenizerProgram:
    """The programs of a tokenizer and its discriminator; each takes images of any of their sizes.

    Attributes:
        run: the config.
        tokenizers: the module with the scales of each image size, by (height, width); the model's
            own is the first.
        optimizer: makes updates of gradients.
        constants: names of the parameters that stay as they are.
        competition: the programs of the discriminator, or None.
    """

    run: TokenizerRun
    tokenizers: Mapping[tuple[int, int], nn.Module]
    optimizer: optax.GradientTransformation
    constants: frozenset[str]
    competition: Competition | None

    @property
    def tokenizer(self) -> nn.Module:
        """The module with the scales of the model's own size."""
        return next(iter(self.tokenizers.values()))

    def _bound(self, params: Any, images: jax.Array) -> Any:
        """The tokenizer with the scales of the size of these images, bound to its parameters."""
        return bind(self.tokenizers[images.shape[1:3]], params)

    def start(self, params: Any) -> TrainState:
        """The state before step 0."""
        most_scales = max(one.schedule.steps for one in self.tokenizers.values())
        usage, adversary = (most_scales, self.tokenizer.codes.num_logits), None
        if self.competition:
            key = jax.random.fold_in(jax.random.key(self.run.seed), ADVERSARY_KEY)
            adversary = self.competition.init(key, self.tokenizer.resolution)
        return TrainState.start(
            params, self.optimizer, ema=self.run.ema > 0, usage=usage, adversary=adversary
        )

    def init_params(self, key: jax.Array) -> Any:
        """The boxed random parameters."""
        images = jax.ShapeDtypeStruct((1, *self.run.model.resolution, 3), jnp.float32)
        return self.tokenizer.lazy_init(key, images)['params']

    def _forward(
        self, params: Any, images: jax.Array, quantised: bool, key: jax.Array
    ) -> TokenizerForward:
        """Images, encoded and decoded. Without the quantiser the decoder reads the features."""
        objective, dtype = self.run.objective, self.run.dtype
        tokenizer = self._bound(_in_dtype(params, dtype), images)
        signed = pixels.to_signed(images)
        f_BHWC = tokenizer.features(layers.activations(signed, dtype))
        codes = tokenizer.quantise(f_BHWC)
        canvas_BHWC, losses = f_BHWC, {}
        if quantised:
            read = codes
            if objective.scale_dropout:
                read = drop_scales(codes, key, objective.scale_dropout)
            canvas_BHWC = read.straight_through(f_BHWC)
        decoded = tokenizer.decode_unclamped(canvas_BHWC)
        if quantised:
            losses['quantiser'] = objective.quantisation(f_BHWC, codes)
            losses |= objective.entropies(tokenizer, codes)
        decoded = decoded.astype(layers.at_least_float32(decoded.dtype))
        return TokenizerForward(signed.astype(decoded.dtype), decoded, codes, losses)

    def _loss(
        self,
        params: Any,
        images: jax.Array,
        distance: Perceptual | None,
        quantised: bool,
        key: jax.Array,
    ) -> tuple[jax.Array, tuple]:
        """The loss without a discriminator, its parts, and the forward pass."""
        forward = self._forward(params, images, quantised, key)
        parts = self.run.objective.reconstruction(forward.images, forward.decoded, distance)
        parts |= forward.losses
        return sum(parts.values()), (parts, forward)

    def train(
        self,
        quantised: bool,
        state: TrainState,
        batches: tuple[jax.Array, ...],
        distance: Perceptual | None,
        keys_A: jax.Array,
    ) -> tuple[TrainState, Metrics]:
        """One update of the tokenizer by the mean gradient of micro-batches.

        A discriminator has an update for each of them.

        Args:
            quantised: whether the decoder reads codes; otherwise it reads features (static).
            state: parameters, optimizer and discriminator.
            batches: micro-batches of images, each [B, H, W, 3] uint8.
            distance: the perceptual distance, or None.
            keys_A: a random key for each micro-batch.

        Returns:
            The next state, and the means of the metrics over the micro-batches.
        """
        differentiate = self._compete if self.competition else self._descend

        def micro_step(
            adversary: Any, images: jax.Array, number: int | jax.Array
        ) -> tuple[Gradients, Parts, Any]:
            key = keys_A[number]
            if self.run.flip:
                mirror_key, key = jax.random.split(key)
                mirrors_B = jax.random.bernoulli(mirror_key, self.run.flip, (len(images),))
                images = jnp.where(mirrors_B[:, None, None, None], images[:, :, ::-1], images)
            now = state.replace(adversary=adversary)
            gradients, adversary, forward, metrics = differentiate(
                now, images, distance, quantised, key
            )
            labels = self.tokenizer.labels(forward.quantised)
            usage_KV = codebook.usage(labels, self.tokenizer.codes)
            used, ratio_B = (usage_KV.sum(0) > 0).mean(), psnr(forward.images, forward.decoded)
            metrics = {'psnr': ratio_B.mean(), 'used': used, **metrics}
            return gradients, (metrics, usage_KV), adversary

        gradients, parts, adversary = accumulate(micro_step, batches, state.adversary)
        metrics_A, usage_AKV = parts
        state = state.update(gradients, self.optimizer, self.run.ema, self.constants)
        usage_KV = usage_AKV.sum(0)
        state = state.replace(
            adversary=adversary, usage_KV=state.usage_KV.at[: len(usage_KV)].add(usage_KV)
        )
        metrics = {name: values_A.mean() for name, values_A in metrics_A.items()}
        if self.competition:
            metrics['gradient_norm'] = gradient_norm(state.opt)
        return state, metrics

    def _descend(
        self,
        state: TrainState,
        images: jax.Array,
        distance: Perceptual | None,
        quantised: bool,
        key: jax.Array,
    ) -> tuple[Gradients, None, TokenizerForward, Metrics]:
        """Gradients without a discriminator."""
        loss = functools.partial(
            self._loss, images=images, distance=distance, quantised=quantised, key=key
        )
        (value, aux), gradients = jax.value_and_grad(loss, has_aux=True)(state.params)
        parts, forward = aux
        return gradients, None, forward, {'loss': value, **parts}

    def _compete(
        self,
        state: TrainState,
        images: jax.Array,
        distance: Perceptual | None,
        quantised: bool,
        key: jax.Array,
    ) -> tuple[Gradients, Any, TokenizerForward, Metrics]:
        """Gradients of the tokenizer, and an update of the discriminator on the decoded images."""
        forward_key, generator_key, discriminator_key = jax.random.split(key, 3)

        def outputs(params: Any) -> tuple[tuple[jax.Array, jax.Array], TokenizerForward]:
            forward = self._forward(params, images, quantised, forward_key)
            return (forward.decoded, sum(forward.losses.values(), jnp.zeros(()))), forward

        def reconstruction(decoded: jax.Array) -> tuple[jax.Array, Metrics]:
            parts = self.run.objective.reconstruction(forward.images, decoded, distance)
            return sum(parts.values()), parts

        def at_last_kernel(cotangent: jax.Array) -> jax.Array:
            (gradients,) = pull((cotangent, jnp.zeros_like(of_codes)))
            return functools.reduce(lambda tree, name: tree[name], LAST_KERNEL, gradients)

        (decoded, of_codes), pull, forward = jax.vjp(outputs, state.params, has_aux=True)
        generator = self.competition.generator(
            state.adversary,
            decoded=decoded,
            reconstruction=reconstruction,
            at_last_kernel=at_last_kernel,
            step=state.step,
            key=generator_key,
        )
        (gradients,) = pull((generator.cotangent, jnp.ones_like(of_codes)))
        adversary, metrics = self.competition.update(
            state.adversary.replace(statistics=generator.statistics),
            images=forward.images,
            decoded=decoded,
            step=state.step,
            key=discriminator_key,
        )
        metrics = {
            'loss': generator.value + of_codes,
            **generator.parts,
            **forward.losses,
            **generator.metrics,
            **metrics,
        }
        return gradients, adversary, forward, metrics

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
    def start_codes(self, state: TrainState, images: jax.Array, key: jax.Array) -> TrainState:
        """The state with a codebook of features of images, [B, H, W, 3] uint8."""
        tokenizer = self._bound(state.params, images)
        f_BHWC = tokenizer.features(pixels.to_signed(images))
        grids, size = tokenizer.schedule.grids, self.run.model.codes
        vectors_VC = codebook.start_codebook(key, f_BHWC, grids, size)
        return _with_codebooks(state, lambda _: vectors_VC)

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
    def restart_codes(self, state: TrainState, images: jax.Array, key: jax.Array) -> TrainState:
        """The state whose unused codes are features of images, [B, H, W, 3] uint8."""
        tokenizer = self._bound(state.params, images)
        f_BHWC = tokenizer.features(pixels.to_signed(images))
        quantised = tokenizer.quantise(f_BHWC)
        usage_V = state.usage_KV.sum(0)
        restart = functools.partial(codebook.restart_unused, key, usage_V, quantised)
        return _with_codebooks(state, restart)

    def score(
        self, params: Any, adversary: Any, images: jax.Array, count: int
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The scores of a batch of held-out images.

        Args:
            params: parameters of the tokenizer.
            adversary: state of the discriminator, or None.
            images: [B, H, W, 3] uint8.
            count: the number of images that count; the others fill the batch.

        Returns:
            PSNR of each image [B] in dB, the counts of the codes [K, V] at every scale over the
            first `count` images, and the accuracy of the discriminator for each image [B] (NaN
            without one).
        """
        tokenizer, signed = self._bound(params, images), pixels.to_signed(images)
        codes = tokenizer.quantise(tokenizer.features(signed))
        decoded = tokenizer.decode(codes.canvases[-1])
        real_B = jnp.arange(len(images)) < count
        usage_KV = codebook.usage(tokenizer.labels(codes), tokenizer.codes, real_B)
        accuracy_B = jnp.full(len(images), jnp.nan)
        if self.competition:
            accuracy_B = self.competition.accuracy(adversary, signed, decoded)
        return psnr(signed, decoded), usage_KV, accuracy_B

    @functools.partial(jax.jit, static_argnums=0)
    def reconstruct(self, params: Any, images: jax.Array) -> jax.Array:
        """The reconstructions of images, both [B, H, W, 3] uint8."""
        tokenizer = self._bound(params, images)
        return tokenizer.to_uint8(tokenizer(pixels.to_signed(images)))


def _in_dtype(params: Any, dtype: str) -> Any:
    """The parameters, those of encoder and decoder in `dtype`."""
    if dtype == 'float32':
        return params
    networks = {name: params[name] for name in ('encoder', 'decoder')}
    return params | jax.tree.map(lambda leaf: leaf.astype(dtype), networks)


def _with_codebooks(state: TrainState, change: Callable[[jax.Array], jax.Array]) -> TrainState:
    """The state with its codebook changed, and that of the averages in the same way."""

    def put(params: Any) -> Any:
        quantiser = params['quantiser']
        return params | {'quantiser': quantiser | {'codebook': change(quantiser['codebook'])}}

    ema = None if state.ema is None else put(state.ema)
    usage_KV = jnp.zeros_like(state.usage_KV)
    return state.replace(params=put(state.params), ema=ema, usage_KV=usage_KV)
