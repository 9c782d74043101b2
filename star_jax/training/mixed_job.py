"""How is a transformer trained on images of several aspect ratios?"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

from star_jax.core.schedule import Pyramid
from star_jax.data import mixed, pipeline
from star_jax.data.crops import WHOLE_IMAGES
from star_jax.data.mixed import MixedSource
from star_jax.errors import UserError
from star_jax.families.fit import templates_flaw
from star_jax.losses import tokens
from star_jax.losses.tokens import Metrics
from star_jax.parallel import peer_watchdog, rules
from star_jax.training import cache
from star_jax.training.compile_ahead import CompileAhead
from star_jax.training.program import StepInputs, step_keys
from star_jax.training.run import Run
from star_jax.training.state import TrainState
from star_jax.training.template_programs import (
    SharedPrograms,
    TemplatePrograms,
    abstract,
    shared_programs,
    template_programs,
)
from star_jax.training.transformer_job import TransformerJob


class MixedJob(TransformerJob):
    """Trains on images that are sorted into the templates of the model.

    A step trains on images of one template, in the share that it has of the images. Encoding is
    compiled for each template, on first use; the step of the transformer for each list of step
    sizes, in the background from the first step on, the most frequent first. Sample
    grids have the model's own grids.
    """

    def __init__(self, run: Run) -> None:
        if run.crops != WHOLE_IMAGES:
            raise UserError(
                f'crops.enlarge {run.crops.enlarge} crops images of one size, and the model has '
                f'templates of several aspect ratios ({", ".join(run.model.templates.names[:3])}, '
                '...): leave crops out, or set model.templates to Templates()'
            )
        if reason := templates_flaw(run.model):
            raise UserError(
                f'{reason}: set model.grids and model.reference to those of a template, or '
                'model.templates to Templates(), for images of one size'
            )
        templates, scales = run.model.templates, run.model.schedule.steps
        self._schedules = {name: templates.schedule(name, scales) for name in templates.names}
        self._shared: dict[tuple[int, ...], SharedPrograms] = {}
        self._ahead = CompileAhead()
        self.template = functools.cache(self._template)
        super().__init__(run)
        if jax.process_count() > 1:
            peer_watchdog.check_same('templates of the images', self.source.fingerprint())

    def summary(self) -> dict[str, str]:
        """The size of the run; work and tokens are those of the model's own grids."""
        counts = zip(self._schedules.items(), self.source.counts, strict=True)
        used = {name: (it.sizes, count) for (name, it), count in counts if count}
        shares = [f'{name} {count / len(self.source):.1%}' for name, (_, count) in used.items()]
        programs = len({sizes for sizes, _ in used.values()})
        listed = f'{len(used)} in {programs} programs: {", ".join(shares)}'
        return super().summary() | {'templates': listed}

    def batches(self, step: int) -> Iterator[tuple[int, tuple[StepInputs, ...]]]:
        self._warm_texts()
        batch, numbers = self.run.batch, range(self.run.optimizer.accumulate)
        read = mixed.batches(
            self.source,
            batch=len(numbers) * batch,
            seed=self.run.seed,
            step=step,
            rows=np.concatenate([number * batch + self._rows for number in numbers]),
            captions=self.run.captions,
        )
        held = len(self._rows)
        for template, images in read:
            parts = (
                {name: rows[number * held : (number + 1) * held] for name, rows in images.items()}
                for number in numbers
            )
            yield template, tuple(self._template_inputs(template, part) for part in parts)

    def step(
        self, step: int, state: TrainState, batch: tuple[int, tuple[StepInputs, ...]]
    ) -> tuple[TrainState, Metrics]:
        template, batches = self.template(batch[0]), batch[1]
        keys_A = step_keys(jax.random.key(self.run.seed), step, len(batches))
        with_targets = functools.partial(template.with_targets, self.frozen.tokenizer)
        batches = tuple(map(with_targets, batches, keys_A))
        if not self._ahead.started:
            self._compile_ahead(batch[0], state, batches, keys_A)
        self._ahead.wait(template.shared.names)
        return template.shared.train(state, self.frozen, batches, keys_A)

    def _compile_ahead(
        self, first: int, state: TrainState, batches: tuple[StepInputs, ...], keys_A: jax.Array
    ) -> None:
        """Compiles the steps of all templates that have images, the most frequent first.

        Args:
            first: the template of the step that waits.
            state: before that step.
            batches: its micro-batches, with targets.
            keys_A: their keys.
        """
        counts = self.source.counts
        others = sorted(np.flatnonzero(counts).tolist(), key=lambda number: -counts[number])
        compiled: dict[tuple[str, ...], Callable[[], None]] = {}
        for template in map(self.template, (first, *others)):
            shared = template.shared
            if shared.names not in compiled:
                inputs = template.abstract_inputs(
                    self.frozen.tokenizer, batches[0].prompts, batch=self.run.batch, key=keys_A[0]
                )
                args = (abstract(state), self.frozen, (inputs,) * len(batches), keys_A)
                compiled[shared.names] = functools.partial(shared.compile_train, args)
        self._ahead.start(compiled)

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Loss and accuracy on the validation set, over all images and per scale; loss by template.

        Every image counts alike, whatever its number of tokens.
        """
        key, sums, scores = jax.random.key(0), {}, {}
        for number in np.unique(self.validation.template_of).tolist():
            part, template = self.validation.of_template(number), self.template(number)
            of_tokens = 0.0
            for batch, real in pipeline.padded_batches(part, self.run.batch, self._rows):
                inputs = self._template_inputs(number, batch)
                inputs = template.with_targets(self.frozen.tokenizer, inputs, key)
                losses = template.shared.score(state.averaged, self.frozen, inputs, key)
                of_tokens += tokens.sum_of_images(losses, real)
            means = tokens.mean_per_scale(template.schedule, *(of_tokens / len(part)))
            scores[f'validation/loss/{template.name}'] = float(means['loss'])
            for name, mean in means.items():
                sums[name] = sums.get(name, 0.0) + float(mean) * len(part)
        count = len(self.validation)
        return {f'validation/{name}': value / count for name, value in sums.items()} | scores

    def write_cache(self, path: Path, features: bool = False) -> None:
        """Fills a folder for each template with its encoded images, and one with texts."""
        if not features:
            self.run.correction.check_bits()
        sets = {'data': self.source, 'validation': self.validation}
        for number, schedule in enumerate(self._schedules.values()):
            parts = {name: it.of_template(number) for name, it in sets.items() if it.counts[number]}
            if parts:
                origin = dataclasses.replace(self._origin(schedule), features=features)
                encode = self._encoder(schedule, features)
                origin.write(path / _folder_name(schedule), parts, encode)
        self.origin.write_texts(path, sets)

    def _sources(self, cache_folder: Path | None) -> cache.Sources:
        """The sets, sorted into templates, with encoded images where a cache holds them."""
        config, templates = self.tokenizer.config, self.run.model.templates
        sizes = [config.at(schedule).resolution for schedule in self._schedules.values()]
        ratios = [templates.ratio(name) for name in templates.names]
        sets = {}

        def sort() -> None:
            for name, source in self.images.items():
                sets[name] = mixed.sort(source, sizes, ratios)

        peer_watchdog.first_then_others(sort)
        if cache_folder is None:
            return sets
        return {name: self._encoded(name, source, cache_folder) for name, source in sets.items()}

    def _encoded(self, name: str, source: MixedSource, cache_folder: Path) -> MixedSource:
        """A set with the encoded images of a cache."""
        sized = list(source.sized)
        for number in np.unique(source.template_of).tolist():
            template, part = self.template(number), source.of_template(number)
            shape = (self.run.batch, *template.tokenizer.resolution, 3)
            images = jax.ShapeDtypeStruct(shape, np.uint8)
            encoded = jax.eval_shape(template.encode, self.tokenizer.params, images)
            example = jax.ShapeDtypeStruct(encoded.shape[1:], encoded.dtype)
            origin = self._origin(template.schedule)
            path = cache_folder / _folder_name(template.schedule)
            read = origin.read(path, {name: part}, example)[name]
            sized[number] = mixed.Encoded(read, part.members)
        return dataclasses.replace(source, sized=tuple(sized))

    def _origin(self, schedule: Pyramid) -> cache.Origin:
        """The networks and settings that encode the images of a template."""
        run = dataclasses.replace(self.run, model=self.run.model.at(schedule))
        return dataclasses.replace(self.origin, run=run)

    def _template(self, number: int) -> TemplatePrograms:
        """The modules and programs of a template."""
        name, schedule = list(self._schedules.items())[number]
        run = dataclasses.replace(self.run, model=self.run.model.at(schedule))
        config = self.tokenizer.config.at(schedule)
        tokenizer = config.build_training(run.correction, self.origin.features)
        if schedule.sizes not in self._shared:
            named = self._schedules.items()
            self._shared[schedule.sizes] = shared_programs(
                run,
                tuple(other for other, it in named if it.sizes == schedule.sizes),
                tokenizer,
                mesh=self._mesh,
                encode_prompts=self.program.encode_prompts,
            )
        shared = self._shared[schedule.sizes]
        return template_programs(name, run.model, tokenizer, mesh=self._mesh, shared=shared)

    def _template_inputs(self, number: int, batch: pipeline.Batch) -> StepInputs:
        """A batch of a template on the devices, its images encoded."""
        template = self.template(number)
        if self.run.cache:
            encoded = rules.shard_batch(batch['encoded'], self._mesh)
        else:
            images = rules.shard_batch(batch['image'], self._mesh)
            encoded = template.encode(self.frozen.tokenizer, images)
        return StepInputs(
            encoded=encoded,
            prompts=rules.shard_batch(self._prompts(batch['caption']), self._mesh),
            tables=template.tables,
        )


def _folder_name(schedule: Pyramid) -> str:
    """The folder of a template in a cache, such as 3x4."""
    height, width = schedule.grids[-1]
    return f'{height}x{width}'
