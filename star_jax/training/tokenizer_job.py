"""How is a tokenizer trained?"""

import dataclasses
import functools
import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from star_jax import image_io
from star_jax.checkpoint import folder, models
from star_jax.core import pixels
from star_jax.core.flops import count_flops
from star_jax.core.schedule import Pyramid
from star_jax.data import pipeline
from star_jax.data.crops import RandomCrop
from star_jax.errors import UserError
from star_jax.losses.tokenizer import Perceptual, psnr
from star_jax.losses.tokens import Metrics
from star_jax.nn import layers
from star_jax.nn.bind import bind
from star_jax.parallel import rules
from star_jax.tokenizers import codebook, perceptual
from star_jax.tokenizers.scale_dropout import drop_scales
from star_jax.training import summary, warm_start
from star_jax.training.adversary import Competition
from star_jax.training.gradients import Gradients, Parts, accumulate
from star_jax.training.optimizer import gradient_norm, parameter_name
from star_jax.training.program import step_keys
from star_jax.training.run import SizeInTurn, TokenizerRun, enlarged
from star_jax.training.state import TrainState, abstract_state, init_sharded

# The parts of a tokenizer's parameters that no code depends on.
OF_DECODER = ('decoder', 'post_quant_conv')
LAST_KERNEL = ('decoder', 'conv_out', 'kernel')
ADVERSARY_KEY = 2**31 - 1  # folded into the seed: the parameters of the discriminator


class Forward(NamedTuple):
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedSize:
    """One image size of a run.

    Attributes:
        tokenizer: the module, with the scales of this size.
        batch: images per step, over all devices.
        rows: the rows of a batch that this process reads.
        source: the training images.
        validation: the held-out images.
        group: the name of its scores.
    """

    tokenizer: nn.Module
    batch: int
    rows: Sequence[int]
    source: pipeline.Source
    validation: pipeline.Source
    group: str


class TokenizerJob:
    """Trains a tokenizer on the losses of its `Objective`, with a discriminator if that has one.

    Attributes:
        run: the config.
        base: '', because no weights outside of the checkpoints belong to the state.
        sizes: the image sizes, which train in turn; the model's own is the first.
        source: the training images at the model's own size.
        tokenizer: the module with the scales of that size.
        optimizer: makes updates of gradients.
    """

    base = ''

    def __init__(self, run: TokenizerRun) -> None:
        self.run = run
        self._mesh = run.mesh.build()
        self.sizes = [self._size(size) for size in run.sizes]
        self._tokenizers = {size.tokenizer.resolution: size.tokenizer for size in self.sizes}
        if len(self._tokenizers) < len(self.sizes):
            sizes = ', '.join('{} x {}'.format(*size.tokenizer.resolution) for size in self.sizes)
            raise UserError(
                f'two of the sizes in turn have images of the same size ({sizes}): '
                'give other_sizes with another last grid'
            )
        self.source, self.tokenizer = self.sizes[0].source, self.sizes[0].tokenizer
        self._most_scales = max(size.tokenizer.schedule.steps for size in self.sizes)
        self._constants, count = self._untrained(), run.optimizer.accumulate
        self._micro_batches = count * run.pace.steps  # micro-batches of the whole run
        self.optimizer = run.optimizer.for_batch(run.mean_batch / count).build(
            self._micro_batches, constants=self._constants
        )
        self._competition = self._build_competition()
        distance = perceptual.load() if run.objective.perceptual else None
        self._perceptual = rules.shard(distance, rules.replicated(self._mesh))
        self._trains = {
            quantised: jax.jit(functools.partial(self._train, quantised), donate_argnums=0)
            for quantised in (False, True)
        }
        self._score = jax.jit(self._score_batch, out_shardings=rules.replicated(self._mesh))

    def summary(self) -> dict[str, str]:
        state = jax.eval_shape(self._start, self.run.model.abstract())
        train = functools.partial(self._train, True)
        flops = []
        for size in self.sizes:
            images = jax.ShapeDtypeStruct((size.batch, *size.tokenizer.resolution, 3), jnp.uint8)
            batches = (images,) * self.run.optimizer.accumulate
            keys_A = step_keys(jax.random.key(0), 0, len(batches))
            args = (nn.unbox(state), batches, self._perceptual, keys_A)
            flops.append(count_flops(train, *args))
        lines = summary.describe(
            state,
            self.tokenizer.schedule,
            flops=round(statistics.fmean(flops)),
            run=self.run,
            examples=len(self.source),
        )
        return lines | summary.device_sum(self._mesh, self.run.dtype)

    def abstract(self) -> TrainState:
        return abstract_state(self._start, self.run.model.abstract(), self._mesh)

    def init(self) -> TrainState:
        source, params = self.run.init, None
        if source:  # checked before anything is compiled
            params = models.read_tokenizer(source).params
            params = warm_start.fit(params, self.abstract(), source)
        key = jax.random.key(self.run.seed)
        state = init_sharded(self._start, self._init_params, self._mesh, key)
        return state if params is None else warm_start.start(state, params)

    def batches(self, step: int) -> Iterator[tuple[jax.Array, ...]]:
        turns, count = len(self.sizes), self.run.optimizer.accumulate
        batches = [
            pipeline.batches(
                size.source,
                batch=size.batch,
                seed=self.run.seed,
                step=count * ((step - turn + turns - 1) // turns),
                rows=size.rows,
                crop=RandomCrop(size.tokenizer.resolution) if self.run.enlarge > 1 else None,
            )
            for turn, size in enumerate(self.sizes)
        ]
        for turn in itertools.count(step):
            micro_batches = itertools.islice(batches[turn % turns], count)
            yield tuple(rules.shard_batch(batch['image'], self._mesh) for batch in micro_batches)

    def step(
        self, step: int, state: TrainState, batches: tuple[jax.Array, ...]
    ) -> tuple[TrainState, Metrics]:
        run = self.run
        key = jax.random.fold_in(jax.random.key(run.seed), step)
        if step == run.quantised_from > 0 and run.model.has_codebook:
            state = self._start_codes(state, batches[0], key)
        train = self._trains[step >= run.quantised_from]
        keys_A = step_keys(jax.random.key(run.seed), step, len(batches))
        state, metrics = train(state, batches, self._perceptual, keys_A)
        quantised_steps = step + 1 - run.quantised_from
        restarting = step < run.restart_until * run.pace.steps and not run.only
        restarting = restarting and run.model.has_codebook
        if quantised_steps > 0 and quantised_steps % run.restart_every == 0 and restarting:
            state = self._restart_codes(state, batches[0], key)
        return state, metrics

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """PSNR, and per scale how many codes are used and how evenly, over the validation set.

        Beside it the accuracy of the discriminator. Scores of other sizes have the size in their
        names.
        """
        scores = {}
        for size in self.sizes:
            scores |= self._evaluate(size, state)
        return scores

    def compile_grid(self) -> int:
        """Nothing: a few images are reconstructed by every device."""
        return 0

    def sample_grid(self, state: TrainState) -> np.ndarray:
        """Validation images above their reconstructions, at the model's own size."""
        shown = pipeline.evenly_spaced(self.sizes[0].validation, self.run.pace.images)
        decoded = rules.gather(self._reconstruct(state.averaged, shown['image']))
        return image_io.compare(shown['image'], decoded, shown['caption'], 'reconstructed')

    def export(self, state: TrainState, out: Path) -> None:
        params = rules.gather(state.averaged)
        if jax.process_index() == 0:
            folder.write(out, folder.StoredTokenizer(config=self.run.model, params=params))

    def _size(self, size: SizeInTurn) -> TrainedSize:
        """The module, data and programs of one size.

        Raises UserError if the model, the mesh or the data refuse it.
        """
        run = self.run
        model = run.model.at(Pyramid(size.grids))
        own = size.grids == run.model.schedule.grids
        height, width = model.resolution
        summary.check_batch(size.batch, model.resolution, self._mesh)
        return TrainedSize(
            tokenizer=model.build(run.dtype),
            batch=size.batch,
            rows=rules.process_rows(self._mesh, size.batch),
            source=run.data.open(enlarged(model.resolution, run.enlarge)),
            validation=run.validation.open(model.resolution),
            group='validation' if own else f'validation/{height}x{width}',
        )

    def _untrained(self) -> frozenset[str]:
        """The names of the parameters that stay as they are."""
        if not self.run.only:
            return frozenset()
        params = nn.unbox(self.run.model.abstract())
        names = [parameter_name(path) for path, _ in jax.tree.leaves_with_path(params)]
        return frozenset(name for name in names if name.split('/')[0] not in OF_DECODER)

    def _build_competition(self) -> Competition | None:
        """The programs of the discriminator. Raises UserError if it cannot serve all sizes."""
        run, adversary = self.run, self.run.objective.adversary
        if adversary is None:
            return None
        if len(self.sizes) > 1 and not adversary.discriminator.any_size:
            raise UserError(
                'this discriminator has one image size, and the run has '
                f'{len(self.sizes)} in turn: use a PatchGAN, or leave other_sizes out'
            )
        for size in self.sizes:
            try:
                adversary.discriminator.check(size.tokenizer.resolution)
            except ValueError as error:
                raise UserError(str(error)) from error
        return Competition.build(
            adversary,
            resolution=self.tokenizer.resolution,
            steps=self._micro_batches,
            images=run.mean_batch / run.optimizer.accumulate,
            dtype=run.dtype,
        )

    def _evaluate(self, size: TrainedSize, state: TrainState) -> dict[str, float]:
        """The scores of one image size."""
        ratios, counts, accuracies = [], 0.0, []
        for batch, count in pipeline.padded_batches(size.validation, size.batch, size.rows):
            images = rules.shard_batch(batch['image'], self._mesh)
            ratio_B, usage_KV, accuracy = self._score(
                state.averaged, state.adversary, images, count
            )
            ratios.append(np.asarray(ratio_B)[:count])
            counts += np.asarray(usage_KV)
            accuracies.append(float(accuracy))
        used_K = (counts > 0).mean(1)
        perplexity_K = np.asarray(self.tokenizer.codes.perplexity(jnp.asarray(counts)))
        scores = {f'{size.group}/psnr': float(np.concatenate(ratios).mean())}
        for scale, (used, spread) in enumerate(zip(used_K, perplexity_K, strict=True)):
            scores |= {
                f'{size.group}/used/{scale}': float(used),
                f'{size.group}/perplexity/{scale}': float(spread),
            }
        used = float((counts.sum(0) > 0).mean())
        scores |= {f'{size.group}/used': used, f'{size.group}/dead': 1 - used}
        if int(state.step) > self.run.quantised_from:
            summary.warn_of_collapse(np.asarray(counts), self.tokenizer.codes)
        if self._competition:
            accuracy = float(np.mean(accuracies))
            scores[f'{size.group}/discriminator_accuracy'] = accuracy
            if int(state.step) >= self._competition.adversary.start:
                summary.warn_of_winner(accuracy)
        return scores

    def _tokenizer(self, params: Any, images: jax.Array) -> Any:
        """The tokenizer with the scales of the size of these images, bound to its parameters."""
        return bind(self._tokenizers[images.shape[1:3]], params)

    def _start(self, params: Any) -> TrainState:
        """The state before step 0."""
        usage, adversary = (self._most_scales, self.tokenizer.codes.num_logits), None
        if self._competition:
            key = jax.random.fold_in(jax.random.key(self.run.seed), ADVERSARY_KEY)
            adversary = self._competition.init(key, self.tokenizer.resolution)
        return TrainState.start(
            params, self.optimizer, ema=self.run.ema > 0, usage=usage, adversary=adversary
        )

    def _init_params(self, key: jax.Array) -> Any:
        """The boxed random parameters."""
        images = jax.ShapeDtypeStruct((1, *self.run.model.resolution, 3), jnp.float32)
        return self.tokenizer.lazy_init(key, images)['params']

    def _forward(self, params: Any, images: jax.Array, quantised: bool, key: jax.Array) -> Forward:
        """Images, encoded and decoded. Without the quantiser the decoder reads the features."""
        objective, dtype = self.run.objective, self.run.dtype
        tokenizer = self._tokenizer(_in_dtype(params, dtype), images)
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
        return Forward(signed.astype(decoded.dtype), decoded, codes, losses)

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

    def _train(
        self,
        quantised: bool,
        state: TrainState,
        batches: tuple[jax.Array, ...],
        distance: Perceptual | None,
        keys_A: jax.Array,
    ) -> tuple[TrainState, Metrics]:
        """One update of the tokenizer by the mean gradient of micro-batches.

        A discriminator has an update for each of them.
        """
        differentiate = self._compete if self._competition else self._descend

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
        state = state.update(gradients, self.optimizer, self.run.ema, self._constants)
        usage_KV = usage_AKV.sum(0)
        state = state.replace(
            adversary=adversary, usage_KV=state.usage_KV.at[: len(usage_KV)].add(usage_KV)
        )
        metrics = {name: values_A.mean() for name, values_A in metrics_A.items()}
        if self._competition:
            metrics['gradient_norm'] = gradient_norm(state.opt)
        return state, metrics

    def _descend(
        self,
        state: TrainState,
        images: jax.Array,
        distance: Perceptual | None,
        quantised: bool,
        key: jax.Array,
    ) -> tuple[Gradients, None, Forward, Metrics]:
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
    ) -> tuple[Gradients, Any, Forward, Metrics]:
        """Gradients of the tokenizer, and an update of the discriminator on the decoded images."""
        forward_key, generator_key, discriminator_key = jax.random.split(key, 3)

        def outputs(params: Any) -> tuple[tuple[jax.Array, jax.Array], Forward]:
            forward = self._forward(params, images, quantised, forward_key)
            return (forward.decoded, sum(forward.losses.values(), jnp.zeros(()))), forward

        def reconstruction(decoded: jax.Array) -> tuple[jax.Array, Metrics]:
            parts = self.run.objective.reconstruction(forward.images, decoded, distance)
            return sum(parts.values()), parts

        def at_last_kernel(cotangent: jax.Array) -> jax.Array:
            (gradients,) = pull((cotangent, jnp.zeros_like(of_codes)))
            return functools.reduce(lambda tree, name: tree[name], LAST_KERNEL, gradients)

        (decoded, of_codes), pull, forward = jax.vjp(outputs, state.params, has_aux=True)
        generator = self._competition.generator(
            state.adversary,
            decoded=decoded,
            reconstruction=reconstruction,
            at_last_kernel=at_last_kernel,
            step=state.step,
            key=generator_key,
        )
        (gradients,) = pull((generator.cotangent, jnp.ones_like(of_codes)))
        adversary, metrics = self._competition.update(
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
    def _start_codes(self, state: TrainState, images: jax.Array, key: jax.Array) -> TrainState:
        tokenizer = self._tokenizer(state.params, images)
        f_BHWC = tokenizer.features(pixels.to_signed(images))
        grids, size = tokenizer.schedule.grids, self.run.model.codes
        vectors_VC = codebook.start_codebook(key, f_BHWC, grids, size)
        return _with_codebooks(state, lambda _: vectors_VC)

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
    def _restart_codes(self, state: TrainState, images: jax.Array, key: jax.Array) -> TrainState:
        tokenizer = self._tokenizer(state.params, images)
        f_BHWC = tokenizer.features(pixels.to_signed(images))
        quantised = tokenizer.quantise(f_BHWC)
        usage_V = state.usage_KV.sum(0)
        restart = functools.partial(codebook.restart_unused, key, usage_V, quantised)
        return _with_codebooks(state, restart)

    def _score_batch(
        self, params: Any, adversary: Any, images: jax.Array, count: int
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """PSNR of each image, the code counts of the first `count`, the discriminator's accuracy.

        That is NaN without a discriminator.
        """
        tokenizer, signed = self._tokenizer(params, images), pixels.to_signed(images)
        codes = tokenizer.quantise(tokenizer.features(signed))
        decoded = tokenizer.decode(codes.canvases[-1])
        real_B = jnp.arange(len(images)) < count
        usage_KV = codebook.usage(tokenizer.labels(codes), tokenizer.codes, real_B)
        accuracy = jnp.nan
        if self._competition:
            accuracy = self._competition.accuracy(adversary, signed, decoded)
        return psnr(signed, decoded), usage_KV, accuracy

    @functools.partial(jax.jit, static_argnums=0)
    def _reconstruct(self, params: Any, images: jax.Array) -> jax.Array:
        tokenizer = self._tokenizer(params, images)
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
