"""How is a tokenizer trained?"""

import functools
from collections.abc import Callable, Iterator
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
from star_jax.data import pipeline
from star_jax.losses.tokenizer import Perceptual, psnr
from star_jax.parallel import rules
from star_jax.tokenizers import codebook, perceptual
from star_jax.training import summary
from star_jax.training.run import TokenizerRun
from star_jax.training.state import (
    TrainState,
    abstract_sharded,
    averaged,
    build_state,
    fitted,
    go_on_from,
    init_sharded,
)

SHOWN = 16  # pictures of a reconstruction grid


class TokenizerJob:
    """Reconstruction and quantiser losses, straight-through (STAR specification 1.8)."""

    base = ''

    def __init__(self, run: TokenizerRun) -> None:
        self.run = run
        self.mesh = run.mesh.build()
        summary.check_batch(run.batch, run.model.resolution, self.mesh)
        self._rows = rules.process_rows(self.mesh, run.batch)
        self.tokenizer = run.model.build()
        self.optimizer = run.optimizer.build(run.pace.steps)
        judge = perceptual.load() if run.objective.perceptual else None
        self.frozen = rules.shard(judge, rules.replicated(self.mesh))
        self.source = run.data.open(run.model.resolution)
        self._steps = {
            quantised: jax.jit(functools.partial(self._step, quantised), donate_argnums=0)
            for quantised in (False, True)
        }
        self._score = jax.jit(self._score_on, out_shardings=rules.replicated(self.mesh))

    def summary(self) -> dict[str, str]:
        state = jax.eval_shape(self._build, jax.random.key(0))
        images = self._pixels(self.run.batch)
        step = functools.partial(self._step, True)
        flops = count_flops(step, nn.unbox(state), images, self.frozen)
        return summary.describe(state, self.tokenizer.schedule, flops, self.run, len(self.source))

    def abstract(self) -> TrainState:
        return abstract_sharded(self._build, self.mesh)

    def init(self) -> TrainState:
        init = functools.partial(init_sharded, self._build, self.mesh)
        key, where = jax.random.key(self.run.seed), self.run.init
        if not where:
            return init(key)
        given = models.read_tokenizer(where).params  # before anything is compiled
        params = fitted(given, self.abstract(), where)
        return go_on_from(init(key), params)

    def batches(self, step: int) -> Iterator[jax.Array]:
        for batch in pipeline.batches(
            self.source,
            batch=self.run.batch,
            seed=self.run.seed,
            step=step,
            rows=self._rows,
        ):
            yield rules.shard_batch(batch['image'], self.mesh)

    def step(
        self, step: int, state: TrainState, images: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        run = self.run
        key = jax.random.fold_in(jax.random.key(run.seed), step)
        if step == run.plain_steps > 0:
            state = self._start_codes(state, images, key)
        state, metrics = self._steps[step >= run.plain_steps](state, images, self.frozen)
        quantised_steps = step + 1 - run.plain_steps
        restarting = step < run.restart_until * run.pace.steps
        if quantised_steps > 0 and quantised_steps % run.restart_every == 0 and restarting:
            state = self._restart_codes(state, images, key)
        return state, metrics

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """PSNR, and per scale how many codes are used and how evenly, over the validation set."""
        ratios, counts = [], 0.0
        source = self.run.validation.open(self.run.model.resolution)
        for batch, count in pipeline.padded(source, self.run.batch, self._rows):
            images = rules.shard_batch(batch['image'], self.mesh)
            ratio_B, usage_KV = self._score(averaged(state), images, count)
            ratios.append(np.asarray(ratio_B)[:count])
            counts += np.asarray(usage_KV)
        used_K = (counts > 0).mean(1)
        perplexity_K = np.asarray(codebook.perplexity(jnp.asarray(counts)))
        scores = {'validation/psnr': float(np.concatenate(ratios).mean())}
        for scale, (used, spread) in enumerate(zip(used_K, perplexity_K, strict=True)):
            scores |= {
                f'validation/used/{scale}': float(used),
                f'validation/perplexity/{scale}': float(spread),
            }
        scores['validation/used'] = float((counts.sum(0) > 0).mean())
        if int(state.step) > self.run.plain_steps:
            summary.warn_of_collapse(np.asarray(counts))
        return scores

    def picture(self, state: TrainState) -> np.ndarray:
        """Validation images over their reconstructions."""
        shown = pipeline.spread(self.run.validation.open(self.run.model.resolution), SHOWN)
        painted = rules.gather(self._reconstruct(averaged(state), shown['image']))
        return image_io.compare(shown['image'], painted, shown['caption'], 'reconstructed')

    def export(self, state: TrainState, out: Path) -> None:
        params = rules.gather(averaged(state))
        if jax.process_index() == 0:
            folder.write(out, folder.StoredTokenizer(config=self.run.model, params=params))

    def _build(self, key: jax.Array) -> TrainState:
        usage = (self.tokenizer.schedule.steps, self.run.model.codes)
        return build_state(self._init, self.optimizer, self.run.ema > 0, key, usage)

    def _init(self, key: jax.Array) -> Any:
        return self.tokenizer.init(key, pixels.to_signed(self._pixels(1)))['params']

    def _pixels(self, batch: int) -> jax.Array:
        return jnp.zeros((batch, *self.run.model.resolution, 3), jnp.uint8)

    def _apply(self, params: Any, *args: Any, method: str | None = None) -> Any:
        return self.tokenizer.apply({'params': params}, *args, method=method)

    def _loss(
        self, params: Any, images: jax.Array, judge: Perceptual | None, quantised: bool
    ) -> tuple[jax.Array, tuple]:
        """The loss, its parts, PSNR and codes; features go straight to the decoder before there are
        codes worth having."""
        signed = pixels.to_signed(images)
        f_BHWC = self._apply(params, signed, method='features')
        codes = self._apply(params, f_BHWC, method='quantise')
        canvas = codes.straight_through(f_BHWC) if quantised else f_BHWC
        painted = self._apply(params, canvas, method='decode_unclamped')
        parts = self.run.objective.reconstruction(signed, painted, judge)
        if quantised:
            parts['quantiser'] = self.run.objective.quantisation(f_BHWC, codes)
        return sum(parts.values()), (parts, psnr(signed, painted), codes)

    def _step(
        self, quantised: bool, state: TrainState, images: jax.Array, judge: Perceptual | None
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        loss = functools.partial(self._loss, images=images, judge=judge, quantised=quantised)
        (value, aux), gradients = jax.value_and_grad(loss, has_aux=True)(state.params)
        parts, psnr_B, codes = aux
        state = state.update(gradients, self.optimizer, self.run.ema)
        usage_KV = codebook.usage(codes, self.run.model.codes)
        state = state.replace(usage_KV=state.usage_KV + usage_KV)
        used = (usage_KV.sum(0) > 0).mean()
        return state, {'loss': value, 'psnr': psnr_B.mean(), 'used': used, **parts}

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
    def _start_codes(self, state: TrainState, images: jax.Array, key: jax.Array) -> TrainState:
        f_BHWC = self._apply(state.params, pixels.to_signed(images), method='features')
        sizes = self.run.model
        vectors_VC = codebook.start_codebook(
            key, f_BHWC, self.tokenizer.schedule.grids, sizes.codes
        )
        return _with_codebooks(state, lambda _: vectors_VC)

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
    def _restart_codes(self, state: TrainState, images: jax.Array, key: jax.Array) -> TrainState:
        f_BHWC = self._apply(state.params, pixels.to_signed(images), method='features')
        quantised = self._apply(state.params, f_BHWC, method='quantise')
        usage_V = state.usage_KV.sum(0)
        restart = functools.partial(codebook.restart_dead, key, usage_V, quantised)
        return _with_codebooks(state, restart)

    def _score_on(self, params: Any, images: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
        """PSNR of each image and the code counts of the first `count`."""
        signed = pixels.to_signed(images)
        f_BHWC = self._apply(params, signed, method='features')
        codes = self._apply(params, f_BHWC, method='quantise')
        painted = self._apply(params, codes.canvases[-1], method='decode')
        real_B = jnp.arange(len(images)) < count
        usage_KV = codebook.usage(codes, self.run.model.codes, real_B)
        return psnr(signed, painted), usage_KV

    @functools.partial(jax.jit, static_argnums=0)
    def _reconstruct(self, params: Any, images: jax.Array) -> jax.Array:
        return pixels.to_uint8(self._apply(params, pixels.to_signed(images)))


def _with_codebooks(state: TrainState, change: Callable[[jax.Array], jax.Array]) -> TrainState:
    """The state with its codebook changed, and that of the averages in the same way."""

    def put(params: Any) -> Any:
        quantiser = params['quantiser']
        return params | {'quantiser': quantiser | {'codebook': change(quantiser['codebook'])}}

    ema = None if state.ema is None else put(state.ema)
    usage_KV = jnp.zeros_like(state.usage_KV)
    return state.replace(params=put(state.params), ema=ema, usage_KV=usage_KV)
