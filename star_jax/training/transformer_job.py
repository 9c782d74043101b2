"""How is a transformer trained?"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from star_jax import image_io
from star_jax.checkpoint import folder, models
from star_jax.core.condition import Condition
from star_jax.core.flops import count_flops
from star_jax.core.schedule import Schedule
from star_jax.data import pipeline
from star_jax.families.fit import check_tokenizer
from star_jax.losses import tokens
from star_jax.losses.tokens import Metrics
from star_jax.parallel import peer_watchdog, rules
from star_jax.sampling import program as sampling
from star_jax.text.cache import FeatureCache
from star_jax.text.encoder import load as load_text
from star_jax.text.tokens import Tokens
from star_jax.training import cache, summary, warm_start
from star_jax.training.build import COUNTED, build_program, init_params
from star_jax.training.program import Frozen, StepInputs, step_keys
from star_jax.training.run import Run
from star_jax.training.sample_grid import SampleGrid
from star_jax.training.state import TrainState, abstract_state, init_sharded


class TransformerJob:
    """Trains a transformer on captioned images, with a frozen tokenizer and prompt encoder.

    A class-conditional model uses the label of an image as its caption.

    Attributes:
        run: the config.
        base: '', because no weights outside of the checkpoints belong to the state.
        source: the training examples.
        validation: the held-out examples.
        images: both, with images where a cache replaces them: by 'data' and 'validation'.
        origin: the networks and settings that fill a cache of this run.
        prompt_encoder: makes conditions of prompts.
        tokenizer: config and parameters of the image tokenizer.
        texts: the cache of text features; None where prompts are encoded in the training program.
        program: the training program.
        frozen: the arrays that it reads.
    """

    base = ''

    def __init__(self, run: Run) -> None:
        self.run = run
        self._mesh = run.mesh.build()
        mesh_inside = self._mesh if run.text_features == 'inside' else None
        self.prompt_encoder = run.model.prompt_encoder(
            functools.partial(load_text, run.text, dtype=run.text_dtype, mesh=mesh_inside)
        )
        self.tokenizer = models.read_tokenizer(run.tokenizer)
        cache_folder = Path(run.cache) if run.cache else None
        features = cache.holds_features(cache_folder) if cache_folder else None
        if features is False:
            run.correction.check_bits()
        vq = self.tokenizer.config.at(run.model.schedule)
        training_tokenizer = vq.build_training(run.correction, bool(features))
        check_tokenizer(
            run.model,
            vq,
            where=f'the tokenizer {run.tokenizer} does not fit',
            remedy='give the model the sizes of the tokenizer, or name another tokenizer',
        )
        summary.check_batch(run.batch, vq.resolution, self._mesh)
        self._rows = rules.process_rows(self._mesh, run.batch)
        sources = {
            'data': run.data.open(run.crops.loaded_size(vq.resolution)),
            'validation': run.validation.open(vq.resolution),
        }
        self.images = {
            name: source if self.prompt_encoder.field == 'caption' else pipeline.Labelled(source)
            for name, source in sources.items()
        }
        self.origin = cache.Origin(
            run=run,
            tokenizer=self.tokenizer,
            prompt_encoder=self.prompt_encoder,
            features=bool(features),
        )
        self.texts = None
        if cache.keeps_features(run, self.prompt_encoder):
            self.texts = FeatureCache(self.prompt_encoder, cache_folder)
        self.program = build_program(
            run,
            self._mesh,
            training_tokenizer,
            platform=self._mesh.devices.flat[0].platform,
            encode_prompts=self.prompt_encoder.apply if self.texts is None else None,
        )
        sources = self._sources(cache_folder)
        self.source, self.validation = sources['data'], sources['validation']
        shardings = rules.shardings(
            self.tokenizer.config.abstract(), self._mesh, f' of the tokenizer {run.tokenizer}'
        )
        empty, against = self.prompt_encoder.encode(['']), None
        if run.sampling.negative:
            encoded = self.prompt_encoder.encode([run.sampling.negative])
            against = rules.shard(encoded, rules.replicated(self._mesh))
        self.frozen = Frozen(
            tokenizer=rules.shard(self.tokenizer.params, shardings),
            empty=rules.shard(empty, rules.replicated(self._mesh)),
            encoder=self.prompt_encoder.params if self.texts is None else {},  # sharded when loaded
        )
        # UserErrors before anything is computed.
        sampling.step_settings(run.model, run.sampling)
        sampling.sampling_method(run.model, run.sampling)
        self._grid = SampleGrid(
            config=run.model,
            settings=run.sampling,
            images=run.pace.images,
            network=self.program.network,
            tokenizer=vq.build(run.dtype),
            mesh=self._mesh,
            dtype=run.dtype,
            negative=against,
        )
        self._run_grid = self._grid.program
        self._encode = jax.jit(self.program.encode, out_shardings=rules.batch_sharding(self._mesh))
        self._train = jax.jit(self.program.train, donate_argnums=0)
        self._score = jax.jit(self.program.score, out_shardings=rules.replicated(self._mesh))

    def summary(self) -> dict[str, str]:
        run, program = self.run, self.program
        state = jax.eval_shape(program.start, program.trained(run.model.abstract()))
        inputs = StepInputs(
            encoded=program.abstract_encoded(self.frozen.tokenizer, run.batch),
            prompts=self._prompts([''] * run.batch),
        )
        accumulate = run.optimizer.accumulate
        keys_A = step_keys(jax.random.key(0), 0, accumulate)
        args = (nn.unbox(state), self.frozen, (inputs,) * accumulate, keys_A)
        platform = self._mesh.devices.flat[0].platform
        countable = build_program(
            dataclasses.replace(run, **COUNTED),
            self._mesh,
            program.tokenizer,
            platform=platform,
            encode_prompts=program.encode_prompts,
        )
        flops = count_flops(countable.train, *args)
        if not run.cache:
            shape = (run.batch, *program.tokenizer.resolution, 3)
            images = jax.ShapeDtypeStruct(shape, jnp.uint8)
            flops += accumulate * count_flops(program.encode, self.frozen.tokenizer, images)
        lines = summary.describe(
            state, program.network.schedule, flops=flops, run=run, examples=len(self.source)
        )
        return lines | summary.replica_sum(self.abstract().params, self._mesh, run.gradient_dtype)

    def abstract(self) -> TrainState:
        params = self.program.trained(self.run.model.abstract())
        return abstract_state(self.program.start, params, self._mesh)

    def init(self) -> TrainState:
        source = self.run.init
        params = models.read(source).params if source else None  # before anything is compiled
        return self._init(params, source)

    def batches(self, step: int) -> Iterator[tuple[StepInputs, ...]]:
        self._warm_texts()
        accumulate = self.run.optimizer.accumulate
        batches = pipeline.batches(
            self.source,
            batch=self.run.batch,
            seed=self.run.seed,
            step=accumulate * step,
            rows=self._rows,
            crop=self.run.crops.crop(self.program.tokenizer.resolution),
            captions=self.run.captions,
        )
        while True:
            yield tuple(map(self._inputs, itertools.islice(batches, accumulate)))

    def step(
        self, step: int, state: TrainState, batches: tuple[StepInputs, ...]
    ) -> tuple[TrainState, Metrics]:
        keys_A = step_keys(jax.random.key(self.run.seed), step, len(batches))
        return self._train(state, self.frozen, batches, keys_A)

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Loss and accuracy on the validation set, over all tokens and per scale."""
        sums, count, key = 0.0, 0, jax.random.key(0)
        for batch, real in pipeline.padded_batches(self.validation, self.run.batch, self._rows):
            losses = self._score(state.averaged, self.frozen, self._inputs(batch), key)
            sums += tokens.sum_of_images(losses, real)
            count += real
        metrics = tokens.mean_per_scale(self.program.network.schedule, *(sums / count))
        return {f'validation/{name}': float(value) for name, value in metrics.items()}

    def compile_grid(self) -> int:
        params = self._sampling_params(self.abstract())
        empty = self.frozen.empty
        prompted = jax.eval_shape(lambda: self.frozen.empty)
        self._run_grid = self._grid.compile(params, prompted, empty)
        return self._run_grid.memory_analysis().temp_size_in_bytes

    def sample_grid(self, state: TrainState) -> np.ndarray:
        """Validation images above the images that are generated from their captions."""
        shown = pipeline.evenly_spaced(self.images['validation'], self.run.pace.images)
        captions = shown['caption']
        encode = self.prompt_encoder.encode if self.texts is None else self.texts.features
        params = self._sampling_params(state)
        images = self._grid.sample(self._run_grid, params, encode, captions, self.frozen.empty)
        return image_io.compare(shown['image'], images, captions, 'sampled')

    def encode(self, images: np.ndarray) -> jax.Array:
        """This process's uint8 images [B, H, W, 3], encoded by the tokenizer."""
        return self._encode(self.frozen.tokenizer, rules.shard_batch(images, self._mesh))

    def write_cache(self, path: Path, features: bool = False) -> None:
        """Fills a folder with the encoded images of the sets, with codes or with `features`.

        Raises UserError where the tokenizer has none of them, or where codes cannot serve the run.
        """
        if not features:
            self.run.correction.check_bits()
        origin = dataclasses.replace(self.origin, features=features)
        origin.write(path, self.images, self._encoder(self.run.model.schedule, features))
        origin.write_texts(path, self.images)

    def _encoder(self, schedule: Schedule, features: bool) -> Callable[[np.ndarray], jax.Array]:
        """Encodes this process's uint8 images, of the size of a schedule."""
        config = self.tokenizer.config.at(schedule)
        tokenizer = config.build_training(self.run.correction, features)
        compiled = jax.jit(
            functools.partial(tokens.encode, tokenizer),
            out_shardings=rules.batch_sharding(self._mesh),
        )

        def encode(images: np.ndarray) -> jax.Array:
            return compiled(self.frozen.tokenizer, rules.shard_batch(images, self._mesh))

        return encode

    def export(self, state: TrainState, out: Path) -> None:
        params = rules.gather(self._model_params(state))
        if jax.process_index() != 0:
            return
        reference = self.prompt_encoder.reference()
        model = folder.StoredModel(
            config=self.run.model,
            params=params,
            tokenizer=self.tokenizer,
            text=reference and folder.TextEncoderReference(**reference),
            sampling=self.run.sampling,
        )
        folder.write(out, model)

    def _init(self, params: Any, source: str) -> TrainState:
        """The state before step 0, with these parameters of `source` if there are any."""
        if params is not None:
            params = warm_start.fit(params, self.abstract(), source)
        state = init_sharded(
            self.program.start,
            lambda key: self.program.trained(init_params(self.run, key)),
            self._mesh,
            jax.random.key(self.run.seed),
        )
        return state if params is None else warm_start.start(state, params)

    def _sources(self, cache_folder: Path | None) -> cache.Sources:
        """The sets, with encoded images where a cache holds them."""
        if cache_folder is None:
            return self.images
        encoded = self.program.abstract_encoded(self.tokenizer.params, 1)
        example = jax.ShapeDtypeStruct(encoded.shape[1:], encoded.dtype)
        return self.origin.read(cache_folder, self.images, example)

    def _warm_texts(self) -> None:
        """Caches the features of all captions, unless the cache of the run holds them."""
        if self.texts is None or self.run.cache:
            return
        captions = cache.all_texts([self.source], self.run.captions)
        progress = jax.process_index() == 0
        peer_watchdog.first_then_others(lambda: self.texts.warm(captions, progress=progress))

    def _sampling_params(self, state: TrainState) -> Any:
        return {'model': self._model_params(state), 'tokenizer': self.frozen.tokenizer}

    def _model_params(self, state: TrainState) -> Any:
        """The parameters of the model, to sample and export."""
        return self.program.model_params(state.averaged, self.frozen)

    def _inputs(self, batch: pipeline.Batch) -> StepInputs:
        """A batch on the devices, its images encoded."""
        if self.run.cache:
            encoded = rules.shard_batch(batch['encoded'], self._mesh)
        else:
            encoded = self.encode(batch['image'])
        prompts = rules.shard_batch(self._prompts(batch['caption']), self._mesh)
        return StepInputs(encoded=encoded, prompts=prompts)

    def _prompts(self, captions: list[str]) -> Condition | Tokens:
        """The captions as the host encodes them: features, token ids, or labels."""
        encode = self.prompt_encoder.tokenize if self.texts is None else self.texts.features
        return encode(captions)
