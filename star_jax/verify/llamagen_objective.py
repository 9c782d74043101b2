"""How are the recorded losses of a tokenizer and its discriminator computed? (kind `vqloss`)

The recorded "decoder" is one convolution, and the original discriminator normalises by statistics
of the batch. Recorded maps have their channels second.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from star_jax.convert import adversarial, entries
from star_jax.core.argument_types import whole_number
from star_jax.errors import UserError
from star_jax.nn.discriminators import PatchGAN
from star_jax.nn.perceptual import SCALE, SHIFT, Lpips
from star_jax.training.adversary import AdversaryState, Competition, GeneratorStep
from star_jax.training.objective import Adversary, Objective
from star_jax.verify import cases
from star_jax.verify.cases import Case
from star_jax.verify.comparison import GRADIENTS, HIDDEN, OBJECTIVES, TOKENIZED
from star_jax.verify.rules import Rule, inputs

DISCRIMINATOR, PERCEPTUAL = 'discriminator.', 'perceptual_loss.'  # prefixes of tensors
LOSSES = {'hinge': 'hinge', 'vanilla': 'vanilla', 'non-saturating': 'non_saturating_released'}
PIXELS = ('l1', 'l2')
STATISTICS = {'mean': 'mean_C', 'var': 'variance_C'}


class Variant(NamedTuple):
    """One variant of the options: both steps, before any update.

    Attributes:
        generator: the step of the tokenizer.
        pixels: the reconstruction loss of the pixels, without a weight.
        at_kernel: the gradient of the tokenizer's loss at the last kernel.
        discriminator: the weighted loss of the discriminator.
        gradients: gradients of this loss, by the discriminator's parameters.
    """

    generator: GeneratorStep
    pixels: jax.Array
    at_kernel: jax.Array
    discriminator: jax.Array
    gradients: Any


class AdversarialLosses:
    """Losses and gradients of the tokenizer and of the discriminator, for every variant."""

    def __init__(self, case: Case) -> None:
        self.case = case
        option = case.option
        self.config = cases.build(
            case, PatchGAN, width=option('disc_ndf'), layers=option('disc_n_layers')
        )
        self.entries = adversarial.discriminator_entries(self.config, DISCRIMINATOR)
        own = {name: x for name, x in case.state.items() if name.startswith(DISCRIMINATOR)}
        buffers = ('.running_mean', '.running_var', '.num_batches_tracked')
        params = cases.convert(case, self.entries, own, buffers)
        statistics = adversarial.statistics(self.config, own, DISCRIMINATOR)
        self.state = AdversaryState(params=params, statistics=statistics, opt=None)
        self.lpips = self._lpips()
        self.variant = functools.cache(self._variant)

    def rules(self) -> tuple[Rule, ...]:
        def of_variant(name: str, group: str, compute: Callable[[Variant], Any]) -> Rule:
            return Rule(rf'v(\d+)\.{name}', group, lambda v: compute(self.variant(int(v))))

        return (
            inputs('inputs|feat|last_layer_(weight|bias)|codebook_loss_terms'),
            Rule('recon', TOKENIZED, lambda: _recorded(self.decoded)),
            Rule('lpips_per_sample', OBJECTIVES, lambda: self.distances.reshape(-1, 1, 1, 1)),
            Rule('disc_logits_(fake|real)_(trainmode|evalmode)', HIDDEN, self.logits),
            Rule(
                rf'bn_after_gen_step\.{DISCRIMINATOR}main\.(\d+)\.running_(mean|var)',
                HIDDEN,
                self.running,
            ),
            of_variant('gen_loss', OBJECTIVES, lambda v: v.generator.value + self.constants),
            of_variant('rec_loss', OBJECTIVES, lambda v: v.pixels),
            of_variant('adv_loss', OBJECTIVES, lambda v: v.generator.adversarial),
            of_variant('adaptive_weight', OBJECTIVES, lambda v: v.generator.adaptive),
            of_variant('grad_last_layer', GRADIENTS, lambda v: _torch_kernel(v.at_kernel)),
            Rule(r'v(\d+)\.grad_recon', GRADIENTS, self.at_decoded),
            of_variant('disc_loss', OBJECTIVES, lambda v: v.discriminator),
            Rule(r'v(\d+)\.grad\.(.+)', GRADIENTS, self.gradient),
        )

    @property
    def images(self) -> np.ndarray:
        return np.moveaxis(self.case.input('inputs'), 1, -1)

    @property
    def constants(self) -> np.ndarray:
        """The losses of the quantiser, which are recorded numbers here."""
        return self.case.input('codebook_loss_terms').sum()

    @property
    def kernel(self) -> np.ndarray:
        return np.transpose(self.case.input('last_layer_weight'), (2, 3, 1, 0))

    @property
    def decoder(self) -> tuple[np.ndarray, np.ndarray]:
        """Features before the last convolution, and its bias."""
        return np.moveaxis(self.case.input('feat'), 1, -1), self.case.input('last_layer_bias')

    @functools.cached_property
    def decoded(self) -> jax.Array:
        return jax.jit(_convolve)(self.kernel, *self.decoder)

    @functools.cached_property
    def distances(self) -> jax.Array:
        return jax.jit(lambda lpips, *pair: lpips(*pair))(self.lpips, self.images, self.decoded)

    def logits(self, which: str, mode: str) -> np.ndarray:
        images = {'fake': self.decoded, 'real': self.images}[which]
        given = {'trainmode': None, 'evalmode': self.state.statistics}[mode]
        apply = jax.jit(self._competition(Adversary()).network.apply)
        return _recorded(apply({'params': self.state.params}, images, given)[0])

    def running(self, index: str, kind: str) -> jax.Array:
        """A running statistic after one step of the tokenizer."""
        statistics = self.variant(0).generator.statistics[f'norm_{int(index) // 3}']
        return getattr(statistics, STATISTICS[kind])

    def at_decoded(self, variant: str) -> np.ndarray:
        """The array that the original collects as the gradient of the decoded images.

        It adds up everything that passes them: beside the gradient of the loss also both gradients
        from which an adaptive weight is computed.
        """
        step = self.variant(int(variant)).generator
        passed = step.gradients if self.case.option('variants')[int(variant)]['adaptive'] else ()
        return _recorded(sum(passed, step.cotangent))

    def gradient(self, variant: str, name: str) -> np.ndarray:
        gradients = jax.tree.map(np.asarray, self.variant(int(variant)).gradients)
        return entries.to_state(self.entries, gradients)[name]

    def _variant(self, index: int) -> Variant:
        variants = self.case.option('variants')
        if index >= len(variants):
            raise LookupError(f'variants holds no entry {index}')
        entry = variants[index]
        pixels, global_step = entry['rec_loss'], whole_number('global_step', entry['global_step'])
        if pixels not in PIXELS:
            raise UserError(f'{self.case.path}: rec_loss {pixels!r} is unknown, expected l1 or l2')
        objective = Objective(
            **{'l1': 0.0, 'l2': 0.0, 'edges': 0.0, pixels: entry['rec_weight']},
            perceptual=entry['perceptual_weight'],
            adversary=Adversary(
                discriminator=self.config,
                generator_loss=self._named('gen_loss', entry, {'hinge', 'non-saturating'}),
                discriminator_loss=self._named('disc_loss', entry, LOSSES.keys()),
                weight=entry['disc_weight'],
                start=self.case.option('disc_start'),
                adaptive=entry['adaptive'],
            ),
        )
        run = _variant_fn(objective, pixels, self._competition(objective.adversary))
        step = global_step - 1  # the original counts from 1
        features, bias = self.decoder
        return run(
            self.state,
            self.lpips,
            self.images,
            kernel=self.kernel,
            features=features,
            bias=bias,
            step=step,
        )

    def _competition(self, adversary: Adversary) -> Competition:
        network = self.config.build(self.images.shape[1:3])
        return Competition(adversary=adversary, network=network, optimizer=None)

    def _named(self, name: str, entry: Mapping[str, Any], known: Any) -> str:
        """Our name of a loss of the original."""
        if entry[name] not in known:
            raise UserError(
                f'{self.case.path}: {name} {entry[name]!r} is unknown, expected one of '
                f'{", ".join(sorted(known))}'
            )
        return LOSSES[entry[name]]

    def _lpips(self) -> Lpips:
        """The recorded perceptual network. Raises UserError for another scaling of the images."""
        state = self.case.state
        for name, ours in {'shift': SHIFT, 'scale': SCALE}.items():
            recorded = state[f'{PERCEPTUAL}scaling_layer.{name}'].reshape(-1)
            if not np.allclose(recorded, ours, rtol=0, atol=1e-6):
                raise UserError(
                    f'{self.case.folder}: the {name} of the perceptual network is {recorded}, but '
                    f'only {ours} is implemented'
                )
        return adversarial.lpips(state, PERCEPTUAL)


@functools.cache
def _variant_fn(objective: Objective, pixels: str, competition: Competition) -> Callable:
    """State, perceptual network, images and the last layer -> `Variant`, jitted."""

    def run(
        state: AdversaryState,
        lpips: Lpips,
        images: jax.Array,
        *,
        kernel: jax.Array,
        features: jax.Array,
        bias: jax.Array,
        step: jax.Array,
    ) -> Variant:
        key = jax.random.key(0)  # nothing is random
        decoded, pull = jax.vjp(lambda kernel: _convolve(kernel, features, bias), kernel)

        def reconstruction(decoded: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
            parts = objective.reconstruction(images, decoded, lpips)
            return sum(parts.values()), parts

        generator = competition.generator(
            state,
            decoded=decoded,
            reconstruction=reconstruction,
            at_last_kernel=lambda g: pull(g)[0],
            step=step,
            key=key,
        )
        loss = jax.value_and_grad(competition.discriminator, has_aux=True)
        (value, _), gradients = loss(
            state.params, means_2=None, images=images, decoded=decoded, step=step, key=key
        )
        return Variant(
            generator=generator,
            pixels=Objective().reconstruction(images, decoded)[pixels],
            at_kernel=pull(generator.cotangent)[0],
            discriminator=value,
            gradients=gradients,
        )

    return jax.jit(run)


def _convolve(kernel: jax.Array, features: jax.Array, bias: jax.Array) -> jax.Array:
    axes = ('NHWC', 'HWIO', 'NHWC')
    return (
        jax.lax.conv_general_dilated(features, kernel, (1, 1), 'SAME', dimension_numbers=axes)
        + bias
    )


def _recorded(x_BhwC: jax.Array) -> np.ndarray:
    return np.moveaxis(np.asarray(x_BhwC), -1, 1)


def _torch_kernel(kernel_hwio: jax.Array) -> np.ndarray:
    return np.transpose(np.asarray(kernel_hwio), (3, 2, 0, 1))
