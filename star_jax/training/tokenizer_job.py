"""How is a tokenizer trained?"""

import dataclasses
import functools
import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

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
from star_jax.errors import UserError
from star_jax.losses.tokenizer import Perceptual, psnr
from star_jax.losses.tokens import Metrics
from star_jax.nn.bind import bind
from star_jax.parallel import rules
from star_jax.tokenizers import codebook, perceptual
from star_jax.training import summary, warm_start
from star_jax.training.run import SizeInTurn, TokenizerRun
from star_jax.training.state import TrainState, abstract_state, init_sharded


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
    """Trains a tokenizer: reconstruction and quantiser losses (STAR specification 1.8).

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
        self.optimizer = run.optimizer.for_batch(run.mean_batch).build(run.pace.steps)
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
            flops.append(count_flops(train, nn.unbox(state), images, self._perceptual))
        return summary.describe(
            state,
            self.tokenizer.schedule,
            flops=round(statistics.fmean(flops)),
            run=self.run,
            examples=len(self.source),
        )

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

    def batches(self, step: int) -> Iterator[jax.Array]:
        turns = len(self.sizes)
        batches = [
            pipeline.batches(
                size.source,
                batch=size.batch,
                seed=self.run.seed,
                step=(step - turn + turns - 1) // turns,
                rows=size.rows,
            )
            for turn, size in enumerate(self.sizes)
        ]
        for turn in itertools.count(step):
            yield rules.shard_batch(next(batches[turn % turns])['image'], self._mesh)

    def step(self, step: int, state: TrainState, images: jax.Array) -> tuple[TrainState, Metrics]:
        run = self.run
        key = jax.random.fold_in(jax.random.key(run.seed), step)
        if step == run.plain_steps > 0:
            state = self._start_codes(state, images, key)
        state, metrics = self._trains[step >= run.plain_steps](state, images, self._perceptual)
        quantised_steps = step + 1 - run.plain_steps
        restarting = step < run.restart_until * run.pace.steps
        if quantised_steps > 0 and quantised_steps % run.restart_every == 0 and restarting:
            state = self._restart_codes(state, images, key)
        return state, metrics

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """PSNR, and per scale how many codes are used and how evenly, over the validation set.

        Scores of other sizes have the size in their names.
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
        """What trains at a size. Raises UserError if the model, the mesh or the data refuse it."""
        run = self.run
        model = run.model.at(Pyramid(size.grids))
        own = size.grids == run.model.schedule.grids
        height, width = model.resolution
        summary.check_batch(size.batch, model.resolution, self._mesh)
        return TrainedSize(
            tokenizer=model.build(),
            batch=size.batch,
            rows=rules.process_rows(self._mesh, size.batch),
            source=run.data.open(model.resolution),
            validation=run.validation.open(model.resolution),
            group='validation' if own else f'validation/{height}x{width}',
        )

    def _evaluate(self, size: TrainedSize, state: TrainState) -> dict[str, float]:
        """The scores of one image size."""
        ratios, counts = [], 0.0
        for batch, count in pipeline.padded_batches(size.validation, size.batch, size.rows):
            images = rules.shard_batch(batch['image'], self._mesh)
            ratio_B, usage_KV = self._score(state.averaged, images, count)
            ratios.append(np.asarray(ratio_B)[:count])
            counts += np.asarray(usage_KV)
        used_K = (counts > 0).mean(1)
        perplexity_K = np.asarray(codebook.perplexity(jnp.asarray(counts)))
        scores = {f'{size.group}/psnr': float(np.concatenate(ratios).mean())}
        for scale, (used, spread) in enumerate(zip(used_K, perplexity_K, strict=True)):
            scores |= {
                f'{size.group}/used/{scale}': float(used),
                f'{size.group}/perplexity/{scale}': float(spread),
            }
        scores[f'{size.group}/used'] = float((counts.sum(0) > 0).mean())
        if int(state.step) > self.run.plain_steps:
            summary.warn_of_collapse(np.asarray(counts))
        return scores

    def _tokenizer(self, params: Any, images: jax.Array) -> Any:
        """The tokenizer with the scales of the size of these images, bound to its parameters."""
        return bind(self._tokenizers[images.shape[1:3]], params)

    def _start(self, params: Any) -> TrainState:
        """The state before step 0."""
        usage = (self._most_scales, self.run.model.codes)
        return TrainState.start(params, self.optimizer, ema=self.run.ema > 0, usage=usage)

    def _init_params(self, key: jax.Array) -> Any:
        """The boxed random parameters."""
        images = jax.ShapeDtypeStruct((1, *self.run.model.resolution, 3), jnp.float32)
        return self.tokenizer.lazy_init(key, images)['params']

    def _loss(
        self, params: Any, images: jax.Array, distance: Perceptual | None, quantised: bool
    ) -> tuple[jax.Array, tuple]:
        """The loss; its parts, the PSNR [B] of the reconstructions, and the codes.

        Without the quantiser the decoder reads the features themselves.
        """
        tokenizer, signed = self._tokenizer(params, images), pixels.to_signed(images)
        f_BHWC = tokenizer.features(signed)
        codes = tokenizer.quantise(f_BHWC)
        canvas_BHWC = codes.straight_through(f_BHWC) if quantised else f_BHWC
        decoded = tokenizer.decode_unclamped(canvas_BHWC)
        parts = self.run.objective.reconstruction(signed, decoded, distance)
        if quantised:
            parts['quantiser'] = self.run.objective.quantisation(f_BHWC, codes)
        return sum(parts.values()), (parts, psnr(signed, decoded), codes)

    def _train(
        self, quantised: bool, state: TrainState, images: jax.Array, distance: Perceptual | None
    ) -> tuple[TrainState, Metrics]:
        loss = functools.partial(self._loss, images=images, distance=distance, quantised=quantised)
        (value, aux), gradients = jax.value_and_grad(loss, has_aux=True)(state.params)
        parts, psnr_B, codes = aux
        state = state.update(gradients, self.optimizer, self.run.ema)
        usage_KV = codebook.usage(codes, self.run.model.codes)
        state = state.replace(usage_KV=state.usage_KV.at[: len(usage_KV)].add(usage_KV))
        used = (usage_KV.sum(0) > 0).mean()
        return state, {'loss': value, 'psnr': psnr_B.mean(), 'used': used, **parts}

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
        self, params: Any, images: jax.Array, count: int
    ) -> tuple[jax.Array, jax.Array]:
        """PSNR of each image and the code counts of the first `count`."""
        tokenizer, signed = self._tokenizer(params, images), pixels.to_signed(images)
        codes = tokenizer.quantise(tokenizer.features(signed))
        decoded = tokenizer.decode(codes.canvases[-1])
        real_B = jnp.arange(len(images)) < count
        usage_KV = codebook.usage(codes, self.run.model.codes, real_B)
        return psnr(signed, decoded), usage_KV

    @functools.partial(jax.jit, static_argnums=0)
    def _reconstruct(self, params: Any, images: jax.Array) -> jax.Array:
        return pixels.to_uint8(self._tokenizer(params, images)(pixels.to_signed(images)))


def _with_codebooks(state: TrainState, change: Callable[[jax.Array], jax.Array]) -> TrainState:
    """The state with its codebook changed, and that of the averages in the same way."""

    def put(params: Any) -> Any:
        quantiser = params['quantiser']
        return params | {'quantiser': quantiser | {'codebook': change(quantiser['codebook'])}}

    ema = None if state.ema is None else put(state.ema)
    usage_KV = jnp.zeros_like(state.usage_KV)
    return state.replace(params=put(state.params), ema=ema, usage_KV=usage_KV)
