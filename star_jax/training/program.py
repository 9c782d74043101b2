"""Which programs train a transformer?

A program has parts, but no weights and no data: `plan` compiles the programs that a job runs.
`TrainingProgram.loss` is what a step minimises; `training/build.py` makes the parts of a run.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from star_jax.core import condition as conditions
from star_jax.core.codes import Targets
from star_jax.losses import tokens
from star_jax.losses.tokens import Metrics, TokenLosses
from star_jax.nn.bind import bind
from star_jax.nn.blocks import drop_paths
from star_jax.nn.positions import PositionTables
from star_jax.nn.transformer import Transformer
from star_jax.training.gradients import Parts, Replicas, accumulate
from star_jax.training.optimizer import gradient_norm
from star_jax.training.state import TrainState

# Folded into the key of a step for dropout. `jax.random.split(key, 3)` has the keys of 0 to 2.
NOISE = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """The options of a training step besides predicting tokens.

    Attributes:
        condition_drop: probability of the unprompted condition.
        drop_path: rate of stochastic depth at the deepest layer.
        keep_tokens: tokens that are kept; the others are dropped from the last scale (0: all).
        scales: the first so many scales are trained and scored (0: all).
        balance: weight of a scale in the loss: 0 weights all tokens equally, 1 all scales.
        label_smoothing: share of the uniform distribution in the labels.
        bit_loss: mean or sum over the bits of a token.
        loss_scale: factor of the loss, before gradients are clipped.
        ema: decay of the moving average of the parameters (0: no average).
        constants: names of the parameters that are not trained.
    """

    condition_drop: float = 0.0
    drop_path: float = 0.0
    keep_tokens: int = 0
    scales: int = 0
    balance: float = 0.0
    label_smoothing: float = 0.0
    bit_loss: tokens.BitReduction = 'mean'
    loss_scale: float = 1.0
    ema: float = 0.0
    constants: frozenset[str] = frozenset()


@flax.struct.dataclass
class StepInputs:
    """A micro-batch: arrays with one row per image.

    Attributes:
        encoded: the images, encoded by the tokenizer: [B, ...]; or the targets made of them.
        prompts: their conditions, or what the program's `encode_prompts` takes.
        tables: positions of the rows (None: those of the network's schedule).
    """

    encoded: jax.Array | Targets
    prompts: Any
    tables: PositionTables | None = None

    @property
    def batch(self) -> int:
        """Images of the batch."""
        return len(jax.tree.leaves(self.encoded)[0])


@flax.struct.dataclass
class PreparedBatch:
    """A micro-batch, as its loss reads it: all that depends on no trained parameter is computed.

    What is random has a value or a key for each image, so that parts have the losses that they have
    in the whole.

    Attributes:
        targets: inputs and labels.
        condition: the prompted conditions.
        dropped_B: which images lose theirs.
        paths_B2D: scales of stochastic depth, [B, 2, depth]; None: 1.
        noise_B: keys of dropout; None: nothing is dropped.
        shown_BR: which tokens a refinement head is shown; None without a head.
    """

    targets: Targets
    condition: Any
    dropped_B: jax.Array
    paths_B2D: jax.Array | None = None
    noise_B: jax.Array | None = None
    shown_BR: jax.Array | None = None

    @property
    def paths(self) -> jax.Array | None:
        """The scales as the network takes them, [depth, 2, B]."""
        return None if self.paths_B2D is None else self.paths_B2D.T


class TrainedRows(NamedTuple):
    """The rows of a micro-batch that are trained, the same of all images.

    Attributes:
        rows: their numbers; None: all.
        tables: positions of the rows (None: those of the network's schedule).
    """

    rows: np.ndarray | jax.Array | None
    tables: PositionTables | None


@flax.struct.dataclass
class Frozen:
    """Arrays that a step reads and does not change.

    Attributes:
        tokenizer: parameters of the tokenizer.
        empty: the condition of the empty prompt, one row.
        encoder: parameters of `encode_prompts`; empty where the program has none.
        base: parameters of the model below a refinement head; None without a head.
    """

    tokenizer: Any
    empty: Any
    encoder: Any = flax.struct.field(default_factory=dict)
    base: Any = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingProgram:
    """The programs that train all of a transformer, to be jitted by the caller.

    Attributes:
        network: the transformer.
        tokenizer: the module whose codes it predicts.
        optimizer: makes updates of gradients.
        recipe: the options of a step besides predicting tokens.
        encode_prompts: parameters and tokenized prompts -> conditions, where prompts are encoded
            inside the program; None where a batch holds conditions.
        batch_groups: parts of the batch within which rows of the network may mix: the published
            code mixes those of one device.
        replicas: the parts of a batch of which the gradients are kept apart.
    """

    network: Transformer
    tokenizer: nn.Module
    optimizer: optax.GradientTransformation
    recipe: Recipe = Recipe()
    encode_prompts: Callable[[Any, Any], Any] | None = None
    batch_groups: int = 1
    replicas: Replicas = Replicas()

    def trained(self, params: Any) -> Any:
        """The part of a model's parameters that is trained: all of them."""
        return params

    def base(self, params: Any) -> Any:
        """The part of a model's parameters that is frozen: None."""
        return None

    def model_params(self, params: Any, frozen: Frozen) -> Any:
        """The parameters of the model, from the trained ones."""
        return params

    def start(self, params: Any) -> TrainState:
        """The state before step 0, with these trained parameters."""
        return TrainState.start(params, self.optimizer, ema=self.recipe.ema > 0)

    def encode(self, params: Any, images: jax.Array) -> jax.Array:
        """uint8 images [B, H, W, 3], encoded by the tokenizer with its `params`."""
        return tokens.encode(self.tokenizer, params, images)

    def abstract_encoded(self, params: Any, batch: int) -> jax.ShapeDtypeStruct:
        """Shape and dtype of encoded images; the tokenizer's `params` may be abstract."""
        images = jax.ShapeDtypeStruct((batch, *self.tokenizer.resolution, 3), jnp.uint8)
        return jax.eval_shape(self.encode, params, images)

    def train(
        self, state: TrainState, frozen: Frozen, batches: Sequence[StepInputs], keys_A: jax.Array
    ) -> tuple[TrainState, Metrics]:
        """One update by the mean gradient of micro-batches.

        Args:
            state: the state before it.
            frozen: the arrays that do not change.
            batches: the micro-batches.
            keys_A: the key of each (`step_keys`).

        Returns:
            The state after it, and the metrics: means over the micro-batches, and the gradient norm
            before clipping.
        """
        recipe, replicas = self.recipe, self.replicas
        differentiate = jax.grad(self.loss, has_aux=True)
        gradients, parts = self._accumulate(differentiate, state.params, frozen, batches, keys_A)
        gradients = replicas.sum_gradients(gradients)
        state = state.update(gradients, self.optimizer, recipe.ema, recipe.constants)
        metrics_A = jax.vmap(lambda parts: self.metrics(replicas.sum(parts)))(parts)
        metrics = {name: values_A.mean() for name, values_A in metrics_A.items()}
        return state, metrics | {'gradient_norm': gradient_norm(state.opt)}

    def forward(
        self, state: TrainState, frozen: Frozen, batches: Sequence[StepInputs], keys_A: jax.Array
    ) -> tuple[jax.Array, Parts]:
        """The forward pass of `train`, with its arguments: the mean loss, and what `loss` reports.

        Benchmarks compare its time with that of `train`.
        """
        loss, parts = self._accumulate(self.loss, state.params, frozen, batches, keys_A)
        return self.replicas.sum(loss), parts

    def prepare(
        self, frozen: Frozen, inputs: StepInputs, key: jax.Array
    ) -> tuple[PreparedBatch, TrainedRows]:
        """A micro-batch as its loss reads it, and the rows that are trained.

        Args:
            frozen: the arrays that do not change.
            inputs: the micro-batch.
            key: its key (`step_keys`).
        """
        recipe, network, batch = self.recipe, self.network, inputs.batch
        drop_key, path_key, thin_key = jax.random.split(key, 3)
        rows = self._rows
        if recipe.keep_tokens:
            rows = network.schedule.thin(thin_key, recipe.keep_tokens)
        return PreparedBatch(
            targets=self._targets(frozen, inputs, key),
            condition=self.condition(frozen, inputs),
            dropped_B=jax.random.bernoulli(drop_key, recipe.condition_drop, (batch,)),
            paths_B2D=self._paths(path_key, batch) if recipe.drop_path else None,
            noise_B=self._noise(key, batch) if network.drops else None,
        ), TrainedRows(rows, inputs.tables)

    def loss(
        self, params: Any, frozen: Frozen, part: PreparedBatch, trained: TrainedRows
    ) -> tuple[jax.Array, Parts]:
        """The share of a part of a micro-batch in the loss that a step minimises.

        STAR specification 4. The shares of all parts add up to the loss, and so do their metrics.

        Args:
            params: the trained parameters.
            frozen: the arrays that do not change.
            part: the part, from `prepare`.
            trained: the rows that are trained.

        Returns:
            The loss, and what `metrics` takes.
        """
        recipe, network = self.recipe, self._part_network
        losses = tokens.token_losses(
            network,
            self.tokenizer.codes,
            params,
            part.targets,
            self._drop_conditions(params, frozen, part),
            rows=trained.rows,
            paths=part.paths,
            smoothing=recipe.label_smoothing,
            of_bits=recipe.bit_loss,
            tables=trained.tables,
            noise_B=part.noise_B,
        )
        count = losses.trained_BL.shape[1]
        weights_L = tokens.token_weights(network.schedule, count, recipe.balance)
        value = recipe.loss_scale * (weights_L * losses.trained_BL).mean()
        parts = self.replicas.count
        return value / parts, jax.tree.map(lambda loss_BL: loss_BL.mean(0) / parts, losses)

    def metrics(self, parts: Parts) -> Metrics:
        """The metrics of a micro-batch, from the sum of what `loss` returns of its parts.

        The metric `loss` is the mean over the kept tokens, with label smoothing, but without
        `balance` and `loss_scale`; the others are not smoothed.
        """
        trained_L, *unsmoothed = parts
        metrics = tokens.mean_per_scale(self.network.schedule, *unsmoothed)
        return metrics | {'loss': trained_L.mean()}

    def score(self, params: Any, frozen: Frozen, inputs: StepInputs, key: jax.Array) -> TokenLosses:
        """The losses of all trained scales, [B, L], with nothing dropped and nothing smoothed.

        Give the same key for every model, so that held-out losses compare.

        Args:
            params: the trained parameters.
            frozen: the arrays that do not change.
            inputs: the images.
            key: the key of perturbed targets.
        """
        targets = self._targets(frozen, inputs, key)
        condition = self.condition(frozen, inputs)
        return tokens.token_losses(
            self._network,
            self.tokenizer.codes,
            params,
            targets,
            condition,
            rows=self._rows,
            tables=inputs.tables,
        )

    def condition(self, frozen: Frozen, inputs: StepInputs) -> Any:
        """The conditions of a batch."""
        if self.encode_prompts is None:
            return inputs.prompts
        encoded = self.encode_prompts(frozen.encoder, inputs.prompts)
        return self.network.sharding.constrain_batch(encoded)

    def _accumulate(
        self,
        function: Callable[..., tuple[Any, Parts]],
        params: Any,
        frozen: Frozen,
        batches: Sequence[StepInputs],
        keys_A: jax.Array,
    ) -> tuple[Any, Parts]:
        """The mean result of a function with the arguments of `loss`, and what `loss` reports.

        Replicas keep their results apart (`Replicas.map`); the reports have an axis of
        micro-batches before that.
        """

        def micro_step(
            _: None, inputs: StepInputs, number: int | jax.Array
        ) -> tuple[Any, Parts, None]:
            prepared, shared = self.prepare(frozen, inputs, keys_A[number])

            def of_part(part: PreparedBatch) -> tuple[Any, Parts]:
                return function(params, frozen, part, shared)

            return *self.replicas.map(of_part, prepared), None

        result, parts, _ = accumulate(micro_step, batches)
        return result, parts

    @property
    def _rows(self) -> np.ndarray | None:
        """The rows of the trained scales; None for all."""
        scales = self.recipe.scales
        return self.network.schedule.leading_rows(scales) if scales else None

    @property
    def _network(self) -> Transformer:
        """The network for a batch."""
        return self.network.with_batch_groups(self.batch_groups)

    @property
    def _part_network(self) -> Transformer:
        """The network for a part of a batch."""
        parts = self.replicas.count
        network = self.network if parts == 1 else self.network.within_replica()
        return network.with_batch_groups(self.batch_groups // parts)

    def _paths(self, key: jax.Array, batch: int) -> jax.Array:
        """[B, 2, depth] random scales of stochastic depth."""
        return drop_paths(key, self.network.depth, batch, self.recipe.drop_path).T

    def _noise(self, key: jax.Array, batch: int) -> jax.Array:
        """[B] keys of dropout, one per image: the same of any mesh."""
        return jax.random.split(jax.random.fold_in(key, NOISE), batch)

    def _targets(self, frozen: Frozen, inputs: StepInputs, key: jax.Array) -> Targets:
        """Inputs and labels of a batch."""
        if isinstance(inputs.encoded, Targets):
            return inputs.encoded
        return tokens.teacher_forcing(self.tokenizer, frozen.tokenizer, inputs.encoded, key)

    def _drop_conditions(self, params: Any, frozen: Frozen, part: PreparedBatch) -> Any:
        """The conditions of a part of a batch, with the unprompted one where they are dropped."""
        unprompted = bind(self.network, params).unprompted(part.condition, frozen.empty)
        return conditions.choose(part.dropped_B, part.condition, unprompted)


@functools.partial(jax.jit, static_argnums=2)
def step_keys(key: jax.Array, step: int | jax.Array, accumulate: int) -> jax.Array:
    """The keys of the `accumulate` micro-batches of a step, from the key of the run."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, accumulate * step + jnp.arange(accumulate))
