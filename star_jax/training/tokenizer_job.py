"""How is a tokenizer trained?"""

import dataclasses
import functools
import itertools
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from star_jax import image_io
from star_jax.checkpoint import config, folder, models
from star_jax.core.flops import count_flops
from star_jax.core.schedule import Pyramid
from star_jax.data import pipeline
from star_jax.errors import UserError
from star_jax.losses.tokens import Metrics
from star_jax.parallel import rules
from star_jax.protocols import TokenizerConfig
from star_jax.tokenizers import perceptual
from star_jax.training import summary, warm_start
from star_jax.training.adversary import Competition
from star_jax.training.optimizer import parameter_name
from star_jax.training.program import step_keys
from star_jax.training.run import SizeInTurn, TokenizerRun
from star_jax.training.state import TrainState, abstract_state, init_sharded
from star_jax.training.tokenizer_program import TokenizerProgram

# The parts of a tokenizer's parameters that no code depends on.
OF_DECODER = ('decoder', 'post_quant_conv')


@dataclasses.dataclass(frozen=True, kw_only=True)
class SizeParts:
    """The module and the data of one image size.

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
        program: the programs of a step, of the codebook and of scores.
    """

    base = ''

    def __init__(self, run: TokenizerRun) -> None:
        self.run = run
        self._mesh = run.mesh.build()
        self.sizes = [self._size(size) for size in run.sizes]
        tokenizers = {size.tokenizer.resolution: size.tokenizer for size in self.sizes}
        if len(tokenizers) < len(self.sizes):
            sizes = ', '.join('{} x {}'.format(*size.tokenizer.resolution) for size in self.sizes)
            raise UserError(
                f'two of the sizes in turn have images of the same size ({sizes}): '
                'give other_sizes with another last grid'
            )
        self.source, self.tokenizer = self.sizes[0].source, self.sizes[0].tokenizer
        constants, count = self._untrained(), run.optimizer.accumulate
        micro_batches = count * run.pace.steps  # micro-batches of the whole run
        optimizer = run.optimizer.for_batch(run.mean_batch / count)
        self.program = TokenizerProgram(
            run=run,
            tokenizers=tokenizers,
            optimizer=optimizer.build(micro_batches, constants=constants),
            constants=constants,
            competition=self._build_competition(micro_batches),
        )
        distance = perceptual.load() if run.objective.perceptual else None
        self._perceptual = rules.shard(distance, rules.replicated(self._mesh))
        self._trains = {
            quantised: jax.jit(functools.partial(self.program.train, quantised), donate_argnums=0)
            for quantised in (False, True)
        }
        self._score = jax.jit(self.program.score, out_shardings=rules.replicated(self._mesh))

    def summary(self) -> dict[str, str]:
        state = jax.eval_shape(self.program.start, self.run.model.abstract())
        train = functools.partial(self.program.train, True)
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
        return abstract_state(self.program.start, self.run.model.abstract(), self._mesh)

    def init(self) -> TrainState:
        source, params = self.run.init, None
        if source:  # checked before anything is compiled
            stored = models.read_tokenizer(source)
            if self.run.only:
                _check_same(self.run, stored.config)
            params = warm_start.fit(stored.params, self.abstract(), source)
        key = jax.random.key(self.run.seed)
        state = init_sharded(self.program.start, self.program.init_params, self._mesh, key)
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
                crop=self.run.crops.crop(size.tokenizer.resolution),
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
            state = self.program.start_codes(state, batches[0], key)
        train = self._trains[step >= run.quantised_from]
        keys_A = step_keys(jax.random.key(run.seed), step, len(batches))
        state, metrics = train(state, batches, self._perceptual, keys_A)
        quantised_steps = step + 1 - run.quantised_from
        restarting = step < run.restart_until * run.pace.steps and not run.only
        restarting = restarting and run.model.has_codebook
        if quantised_steps > 0 and quantised_steps % run.restart_every == 0 and restarting:
            state = self.program.restart_codes(state, batches[0], key)
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
        decoded = rules.gather(self.program.reconstruct(state.averaged, shown['image']))
        return image_io.compare(shown['image'], decoded, shown['caption'], 'reconstructed')

    def export(self, state: TrainState, out: Path) -> None:
        params = rules.gather(state.averaged)
        if jax.process_index() == 0:
            folder.write(out, folder.StoredTokenizer(config=self.run.model, params=params))

    def _size(self, size: SizeInTurn) -> SizeParts:
        """The module and the data of one size.

        Raises UserError if the model, the mesh or the data refuse it.
        """
        run = self.run
        model = run.model.at(Pyramid(size.grids))
        own = size.grids == run.model.schedule.grids
        height, width = model.resolution
        summary.check_batch(size.batch, model.resolution, self._mesh)
        return SizeParts(
            tokenizer=model.build(run.dtype),
            batch=size.batch,
            rows=rules.process_rows(self._mesh, size.batch),
            source=run.data.open(run.crops.loaded_size(model.resolution)),
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

    def _build_competition(self, steps: int) -> Competition | None:
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
            adversary.discriminator.check(size.tokenizer.resolution)
        return Competition.build(
            adversary,
            resolution=self.tokenizer.resolution,
            steps=steps,
            images=run.mean_batch / run.optimizer.accumulate,
            dtype=run.dtype,
        )

    def _evaluate(self, size: SizeParts, state: TrainState) -> dict[str, float]:
        """The scores of one image size."""
        ratios, counts, accuracies = [], 0.0, []
        for batch, count in pipeline.padded_batches(size.validation, size.batch, size.rows):
            images = rules.shard_batch(batch['image'], self._mesh)
            ratio_B, usage_KV, accuracy_B = self._score(
                state.averaged, state.adversary, images, count
            )
            ratios.append(np.asarray(ratio_B)[:count])
            counts += np.asarray(usage_KV)
            accuracies.append(np.asarray(accuracy_B)[:count])
        used_K = (counts > 0).mean(1)
        perplexity_K = np.asarray(self.tokenizer.codes.perplexity(jnp.asarray(counts)))
        scores = {f'{size.group}/psnr': float(np.concatenate(ratios).mean())}
        for scale, (used, perplexity) in enumerate(zip(used_K, perplexity_K, strict=True)):
            scores |= {
                f'{size.group}/used/{scale}': float(used),
                f'{size.group}/dead/{scale}': float(1 - used),
                f'{size.group}/perplexity/{scale}': float(perplexity),
            }
        used = float((counts.sum(0) > 0).mean())
        scores |= {f'{size.group}/used': used, f'{size.group}/dead': 1 - used}
        # The codes of a decoder that is trained alone are those that it was given.
        if int(state.step) > self.run.quantised_from and not self.run.only:
            summary.warn_of_collapse(
                np.asarray(counts),
                self.tokenizer.codes,
                summary.RESTART if self.run.model.has_codebook else summary.ENTROPY,
                f'{size.group} images',
            )
        if self.program.competition:
            accuracy = float(np.concatenate(accuracies).mean())
            scores[f'{size.group}/discriminator_accuracy'] = accuracy
            if int(state.step) >= self.program.competition.adversary.start:
                summary.warn_of_winner(accuracy)
        return scores


def _check_same(run: TokenizerRun, config_of_init: TokenizerConfig) -> None:
    """Raises UserError unless the tokenizer of `run.init` is that of the run.

    The shapes of parameters do not tell: normalised vectors, grids or groups are other codes.
    """
    if differences := config.differences(config_of_init, run.model):
        raise UserError(
            f'{run.init} is another tokenizer than that of the run '
            f'({"; ".join(f"model.{difference}" for difference in differences)}): its codes stay '
            'the same only with the config that it was trained with'
        )
