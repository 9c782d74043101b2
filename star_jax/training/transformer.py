"""How is a transformer trained?"""

import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from star_jax import image_io
from star_jax.checkpoint import folder, models
from star_jax.core.condition import Condition
from star_jax.core.flops import count_flops
from star_jax.data import pipeline
from star_jax.families.fit import check_tokenizer
from star_jax.losses import tokens
from star_jax.parallel import peer_watchdog, rules
from star_jax.sampling import program
from star_jax.text import FeatureCache
from star_jax.text import load as load_text
from star_jax.text.tokens import Tokens
from star_jax.training import cache, summary, warm_start
from star_jax.training.programs import Programs
from star_jax.training.run import Run
from star_jax.training.state import TrainState, averaged, init_sharded

SHOWN = 16  # pictures of a sample grid


class TransformerJob:
    """A transformer, a frozen tokenizer and what reads prompts, on captioned images.

    Of labelled images the caption is their label.
    """

    PROGRAMS = Programs
    base = ''

    def __init__(self, run: Run) -> None:
        self.run = run
        self.mesh = run.mesh.build()
        inside = self.mesh if run.features == 'inside' else None
        self.encoder = run.model.prompt_encoder(functools.partial(load_text, run.text, mesh=inside))
        self.source_of_codes = models.read_tokenizer(run.tokenizer)
        vq = self.source_of_codes.config.at(run.model.schedule)
        check_tokenizer(
            run.model,
            vq,
            where=f'the tokenizer {run.tokenizer} does not fit',
            remedy='set model.codes and model.channels to those of the tokenizer',
        )
        summary.check_batch(run.batch, vq.resolution, self.mesh)
        self._rows = rules.process_rows(self.mesh, run.batch)
        opened = {
            'data': run.data.open(_enlarged(vq.resolution, run.enlarge)),
            'validation': run.validation.open(vq.resolution),
        }
        self.pictures = {
            name: one if self.encoder.field == 'caption' else pipeline.Labelled(one)
            for name, one in opened.items()
        }
        self.origin = cache.Origin(run=run, tokenizer=self.source_of_codes, encoder=self.encoder)
        place = Path(run.cache) if run.cache else None
        sources = self.origin.read(place, self.pictures) if place else self.pictures
        self.source, self.validation = sources['data'], sources['validation']
        self.texts = None
        if cache.keeps_features(run, self.encoder):
            self.texts = FeatureCache(self.encoder, place)
        frozen, whose = self.source_of_codes, f' of the tokenizer {run.tokenizer}'
        where = rules.shardings(frozen.config.abstract(), self.mesh, whose)
        self.frozen = {
            'tokenizer': rules.shard(frozen.params, where),
            'encoder': self.encoder.params if self.texts is None else {},  # placed when read
            'empty': rules.shard(self.encoder.encode(['']), rules.replicated(self.mesh)),
        }
        self.programs = self.PROGRAMS(
            run,
            self.mesh,
            vq,
            self.encoder,
            inside=self.texts is None,
            platform=self.mesh.devices.flat[0].platform,
        )
        self.model, self.tokenizer = self.programs.model, self.programs.tokenizer
        program.sampling_method(run.model, run.sampling)  # a UserError before anything is computed
        self._sample = program.compile_program(self.model, vq.build(run.dtype))
        self._step = jax.jit(self.programs.train, donate_argnums=0)
        self._score = jax.jit(self.programs.score, out_shardings=rules.replicated(self.mesh))

    def summary(self) -> dict[str, str]:
        state = jax.eval_shape(self.programs.build, jax.random.key(0))
        rows = self.run.batch
        codes_BL = np.zeros((rows, self.model.schedule.length), np.int32)
        batch = {'codes': codes_BL, 'text': self._words([''] * rows)}
        flops = count_flops(
            self.programs.plain.train, nn.unbox(state), self.frozen, batch, jax.random.key(0)
        )
        if not self.run.cache:
            images = np.zeros((rows, *self.tokenizer.resolution, 3), np.uint8)
            flops += count_flops(self.programs.encode, self.frozen['tokenizer'], images)
        return summary.describe(state, self.model.schedule, flops, self.run, len(self.source))

    def abstract(self) -> TrainState:
        return self.programs.abstract()

    def init(self) -> TrainState:
        init = functools.partial(init_sharded, self.programs.build, self.mesh)
        key, where = jax.random.key(self.run.seed), self.run.init
        if not where:
            return init(key)
        given = models.read(where).params  # before anything is compiled
        params = warm_start.fitted(given, self.abstract(), where)
        return warm_start.begin(init(key), params)

    def batches(self, step: int) -> Iterator[dict[str, Any]]:
        if self.texts is not None and not self.run.cache:
            captions = map(self.source.captions, range(len(self.source)))
            captions, shown = list(itertools.chain.from_iterable(captions)), not jax.process_index()
            peer_watchdog.first_then_others(lambda: self.texts.warm(captions, progress=shown))
        for batch in pipeline.batches(
            self.source,
            batch=self.run.batch,
            seed=self.run.seed,
            step=step,
            rows=self._rows,
            crop=self.tokenizer.resolution if self.run.enlarge > 1 else None,
        ):
            yield self._batch(batch)

    def step(
        self, step: int, state: TrainState, batch: dict[str, Any]
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(self.run.seed), step)
        return self._step(state, self.frozen, batch, key)

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Loss and accuracy, over all tokens and per scale, on the validation set."""
        sums, count = 0.0, 0
        for batch, real in pipeline.padded(self.validation, self.run.batch, self._rows):
            losses = self._score(averaged(state), self.frozen, self._batch(batch))
            sums += np.stack([np.asarray(x_BL)[:real].sum(0) for x_BL in losses])
            count += real
        scalars = tokens.scales(self.model.schedule, *(sums / count))
        return {f'validation/{name}': float(value) for name, value in scalars.items()}

    def picture(self, state: TrainState) -> np.ndarray:
        """Validation images over what is drawn from their captions."""
        run, shown = self.run, pipeline.spread(self.pictures['validation'], SHOWN)
        captions = shown['caption']
        weights = {'model': self._weights(state), 'tokenizer': self.frozen['tokenizer']}
        params = program.cast(weights, run.dtype)
        read = self.encoder.encode if self.texts is None else self.texts.features
        text, empty = read(captions), self.frozen['empty']
        keys_B = program.image_keys(range(len(captions)))
        inputs = program.inputs(run.model, run.sampling, keys_B=keys_B, prompted=text, empty=empty)
        images = self._sample(params, inputs)
        return image_io.compare(shown['image'], rules.gather(images), captions, 'drawn')

    def encode(self, images: np.ndarray) -> jax.Array:
        """Codes [B, L] of this process's uint8 images [B, H, W, 3]."""
        return self.programs.encode(self.frozen['tokenizer'], rules.shard_batch(images, self.mesh))

    def export(self, state: TrainState, out: Path) -> None:
        params = rules.gather(self._weights(state))
        if jax.process_index() != 0:
            return
        reference = self.encoder.reference()
        model = folder.StoredModel(
            config=self.run.model,
            params=params,
            tokenizer=self.source_of_codes,
            text=reference and folder.TextEncoderReference(**reference),
            sampling=self.run.sampling,
        )
        folder.write(out, model)

    def _weights(self, state: TrainState) -> Any:
        """The parameters of the whole model, to use."""
        return averaged(state)

    def _batch(self, batch: pipeline.Batch) -> dict[str, Any]:
        """Codes [B, L] and text, on the devices."""
        if self.run.cache:
            codes_BL = rules.shard_batch(batch['codes'], self.mesh)
        else:
            codes_BL = self.encode(batch['image'])
        return {
            'codes': codes_BL,
            'text': rules.shard_batch(self._words(batch['caption']), self.mesh),
        }

    def _words(self, captions: list[str]) -> Condition | Tokens:
        """The host's part of the conditions: features, token ids, or labels."""
        read = self.encoder.tokenize if self.texts is None else self.texts.features
        return read(captions)


def _enlarged(resolution: tuple[int, int], factor: float) -> tuple[int, int]:
    height, width = resolution
    return round(factor * height), round(factor * width)
