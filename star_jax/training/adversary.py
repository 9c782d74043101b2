"""How do a tokenizer and a discriminator train in alternation? (LlamaGen specification 1.6)

A step decodes once. The tokenizer gets the gradient of `generator`; then the discriminator learns
from the same images and decoded images, which the update of the tokenizer does not change.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from star_jax.core.settings import Dtype
from star_jax.losses import adversarial
from star_jax.losses.adversarial import PenaltyInputs
from star_jax.nn import discriminators, layers
from star_jax.nn.discriminators import AllStatistics
from star_jax.training.objective import Adversary
from star_jax.training.optimizer import gradient_norm

GROUP = 'adversary'  # names the group of metrics

# decoded images -> the weighted reconstruction loss and its parts
Reconstruction = Callable[[jax.Array], tuple[jax.Array, Any]]


@flax.struct.dataclass
class AdversaryState:
    """The state of a discriminator between steps.

    Attributes:
        params: its parameters.
        statistics: running statistics of its batch norms, which nothing in training reads.
        opt: the state of its optimizer.
        means_2: moving averages of its logits of real and decoded images; None without LeCam.
    """

    params: Any
    statistics: AllStatistics
    opt: Any
    means_2: jax.Array | None = None


class GeneratorStep(NamedTuple):
    """The part of a step that trains the tokenizer.

    Attributes:
        value: the reconstruction loss plus the weighted adversarial loss.
        cotangent: the gradient of `value` with respect to the decoded images.
        parts: parts of the reconstruction loss.
        adversarial: the adversarial loss, without a weight.
        adaptive: the adaptive weight; 1 where it is off.
        gradients: gradients of the reconstruction loss and of the adversarial loss, with respect
            to the decoded images.
        lengths: lengths of both gradients at the decoder's last kernel.
        statistics: the running statistics after the discriminator saw the decoded images.
    """

    value: jax.Array
    cotangent: jax.Array
    parts: Any
    adversarial: jax.Array
    adaptive: jax.Array
    gradients: tuple[jax.Array, jax.Array]
    lengths: tuple[jax.Array, jax.Array]
    statistics: AllStatistics

    @property
    def metrics(self) -> dict[str, jax.Array]:
        return {
            f'{GROUP}/generator': self.adversarial,
            f'{GROUP}/adaptive': self.adaptive,
            f'{GROUP}/gradient_reconstruction': self.lengths[0],
            f'{GROUP}/gradient_generator': self.lengths[1],
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Competition:
    """The programs of a discriminator, to be traced inside a training step.

    Attributes:
        adversary: the losses.
        network: the discriminator.
        optimizer: makes updates of its gradients.
        dtype: dtype of its activations; statistics and logits are at least float32.
    """

    adversary: Adversary
    network: nn.Module
    optimizer: optax.GradientTransformation
    dtype: Dtype = 'float32'

    @classmethod
    def build(
        cls,
        adversary: Adversary,
        *,
        resolution: tuple[int, int],
        steps: int,
        images: float,
        dtype: Dtype,
    ) -> 'Competition':
        """The programs of a run.

        Args:
            adversary: the losses.
            resolution: (height, width) of the images in pixels.
            steps: micro-batches of the whole run.
            images: images per micro-batch.
            dtype: dtype of the activations.
        """
        return cls(
            adversary=adversary,
            network=adversary.discriminator.build(resolution),
            optimizer=adversary.optimizer.for_batch(images).build(steps),
            dtype=dtype,
        )

    def init(self, key: jax.Array, resolution: tuple[int, int]) -> AdversaryState:
        """The state before step 0, boxed with logical axes."""
        images = jax.ShapeDtypeStruct((1, *resolution, 3), jnp.float32)
        params = self.network.lazy_init(key, images)['params']
        return self.start(params, resolution)

    def start(self, params: Any, resolution: tuple[int, int]) -> AdversaryState:
        """The state before step 0, with these parameters."""
        images = jax.ShapeDtypeStruct((1, *resolution, 3), jnp.float32)
        abstract = jax.eval_shape(self._apply, nn.unbox(params), images)[1]
        statistics = {
            name: discriminators.Statistics(
                jnp.zeros(each.mean_C.shape), jnp.ones(each.variance_C.shape)
            )
            for name, each in abstract.items()
        }
        penalty = self.adversary.penalty
        means_2 = penalty.start() if penalty else None
        return AdversaryState(params, statistics, self.optimizer.init(params), means_2)

    def weight(self, step: jax.Array) -> jax.Array:
        """The weight of both adversarial losses in a step, counted from 0."""
        return jnp.where(step + 1 >= self.adversary.start, self.adversary.weight, 0.0)

    def generator(
        self,
        state: AdversaryState,
        decoded: jax.Array,
        reconstruction: Reconstruction,
        at_last_kernel: Callable[[jax.Array], jax.Array],
        step: jax.Array,
        key: jax.Array,
    ) -> GeneratorStep:
        """The gradient that trains the tokenizer, with its losses.

        Args:
            state: state of the discriminator.
            decoded: [B, H, W, 3] decoded images, not clamped.
            reconstruction: the weighted reconstruction loss of decoded images, and its parts.
            at_last_kernel: gradient of decoded images -> gradient of the decoder's last kernel.
            step: training step, counted from 0.
            key: random key of the augmentation.
        """

        def deceived(decoded: jax.Array) -> tuple[jax.Array, AllStatistics]:
            logits, batch = self._apply(state.params, self._changed(key, decoded))
            return adversarial.OF_GENERATOR[self.adversary.generator_loss](logits), batch

        (value, parts), gradient = jax.value_and_grad(reconstruction, has_aux=True)(decoded)
        (loss, batch), other = jax.value_and_grad(deceived, has_aux=True)(decoded)
        kernels = at_last_kernel(gradient), at_last_kernel(other)
        adaptive = jnp.ones((), loss.dtype)
        if self.adversary.adaptive:
            adaptive = adversarial.adaptive_weight(*kernels, self.adversary.largest)
        weight = adaptive * self.weight(step)
        return GeneratorStep(
            value=value + weight * loss,
            cotangent=gradient + weight * other,
            parts=parts,
            adversarial=loss,
            adaptive=adaptive,
            gradients=(gradient, other),
            lengths=tuple(optax.tree.norm(kernel) for kernel in kernels),
            statistics=discriminators.follow(state.statistics, batch),
        )

    def discriminator(
        self,
        params: Any,
        means_2: jax.Array | None,
        images: jax.Array,
        decoded: jax.Array,
        step: jax.Array,
        key: jax.Array,
    ) -> tuple[jax.Array, tuple]:
        """The weighted loss of the discriminator with these parameters.

        Args:
            params: its parameters.
            means_2: as for `AdversaryState`.
            images: [B, H, W, 3] real images in [-1, 1].
            decoded: [B, H, W, 3] decoded images; they get no gradient.
            step: training step, counted from 0.
            key: random key of the augmentation.

        Returns:
            The loss, and logits and batch statistics of both, the real images first, and the moving
            averages after the step.
        """
        keys = jax.random.split(key)
        changed = self._changed(keys[0], images)
        real, of_real = self._apply(params, changed)
        stopped = jax.lax.stop_gradient(decoded)
        fake, of_fake = self._apply(params, self._changed(keys[1], stopped))
        loss = adversarial.OF_DISCRIMINATOR[self.adversary.discriminator_loss](real, fake)
        batch = PenaltyInputs(
            logits_of=lambda x: self._apply(params, x)[0],
            images=changed,
            real=real,
            fake=fake,
            means_2=means_2,
            step=step,
        )
        if penalty := self.adversary.penalty:
            loss += penalty.penalty(batch)
            means_2 = penalty.update(batch)
        return self.weight(step) * loss, (real, fake, of_real, of_fake, means_2)

    def update(
        self,
        state: AdversaryState,
        images: jax.Array,
        decoded: jax.Array,
        step: jax.Array,
        key: jax.Array,
    ) -> tuple[AdversaryState, dict[str, jax.Array]]:
        """One update of the discriminator, and its metrics; arguments as for `discriminator`."""
        loss = jax.value_and_grad(self.discriminator, has_aux=True)
        (value, aux), gradients = loss(
            state.params,
            means_2=state.means_2,
            images=images,
            decoded=decoded,
            step=step,
            key=key,
        )
        real, fake, of_real, of_fake, means_2 = aux
        updates, opt = self.optimizer.update(gradients, state.opt, state.params)
        statistics = state.statistics
        for batch in (of_real, of_fake):
            statistics = discriminators.follow(statistics, batch)
        state = state.replace(
            params=optax.apply_updates(state.params, updates),
            statistics=statistics,
            opt=opt,
            means_2=means_2,
        )
        return state, {
            f'{GROUP}/discriminator': value,
            f'{GROUP}/accuracy': adversarial.accuracy(real, fake),
            f'{GROUP}/gradient_discriminator': gradient_norm(opt),
        }

    def accuracy(self, state: AdversaryState, images: jax.Array, decoded: jax.Array) -> jax.Array:
        """The share of right logits for each held-out image, real and decoded [B]."""
        logits = (self._apply(state.params, x)[0] for x in (images, decoded))
        return jax.vmap(adversarial.accuracy)(*logits)

    def _apply(
        self, params: Any, images: jax.Array, given: AllStatistics | None = None
    ) -> tuple[jax.Array, AllStatistics]:
        """Logits, at least float32, and the statistics of the batch."""
        if self.dtype != 'float32':
            params, images = jax.tree.map(lambda x: x.astype(self.dtype), (params, images))
        logits, batch = self.network.apply({'params': params}, images, given)
        return logits.astype(layers.at_least_float32(logits.dtype)), batch

    def _changed(self, key: jax.Array, images: jax.Array) -> jax.Array:
        augmentation = self.adversary.augmentation
        return augmentation(key, images) if augmentation else images
