"""Which programs train a transformer?

A program has parts, but no weights and no data: `plan` compiles the programs that a job runs.
`TrainingProgram.loss` is what a step minimises; `training/build.py` makes the parts of a run.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from star_jax.core import condition as conditions
from star_jax.core.codes import Targets
from star_jax.losses import refinement, tokens
from star_jax.losses.refinement import Unmasking
from star_jax.losses.tokens import Metrics, TokenLosses
from star_jax.nn.bind import bind
from star_jax.nn.blocks import drop_paths
from star_jax.nn.positions import PositionTables
from star_jax.nn.transformer import Transformer
from star_jax.training.optimizer import gradient_norm
from star_jax.training.state import TrainState

NOISE = 2  # folded into the key of a step for dropout
REFINER = 'refiner'  # the name of a refinement head among the parameters of a model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a step does besides predicting tokens.

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
    """The batch of one step: arrays with one row per image.

    Attributes:
        encoded: the images, encoded by the tokenizer: [B, ...]; or the targets made of them.
        prompts: their conditions, or what the program's `encode_prompts` takes.
        tables: where the rows of these images are (None: as the schedule of the network says).
    """

    encoded: jax.Array | Targets
    prompts: Any
    tables: PositionTables | None = None

    @property
    def batch(self) -> int:
        """Images of the batch."""
        return len(jax.tree.leaves(self.encoded)[0])


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
        recipe: what a step does besides predicting tokens.
        encode_prompts: parameters and tokenized prompts -> conditions, where prompts are encoded
            inside the program; None where a batch holds conditions.
        batch_groups: parts of the batch within which rows of the network may mix: the published
            code mixes those of one device.
    """

    network: Transformer
    tokenizer: nn.Module
    optimizer: optax.GradientTransformation
    recipe: Recipe = Recipe()
    encode_prompts: Callable[[Any, Any], Any] | None = None
    batch_groups: int = 1

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
        self, state: TrainState, frozen: Frozen, inputs: StepInputs, key: jax.Array
    ) -> tuple[TrainState, Metrics]:
        """One update. Returns the state and the metrics of the step.

        The gradient norm among them is that before clipping, 0 while gradients are accumulated.
        """

        def loss(params: Any) -> tuple[jax.Array, Metrics]:
            return self.loss(params, frozen, inputs, key)

        gradients, metrics = jax.grad(loss, has_aux=True)(state.params)
        recipe = self.recipe
        state = state.update(gradients, self.optimizer, recipe.ema, recipe.constants)
        return state, metrics | {'gradient_norm': gradient_norm(state.opt)}

    def loss(
        self, params: Any, frozen: Frozen, inputs: StepInputs, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """The loss that a step minimises, and its metrics (STAR specification 4).

        The metric `loss` is the mean over the kept tokens, with label smoothing, but without
        `balance` and `loss_scale`; the others are not smoothed.
        """
        recipe, network, batch = self.recipe, self._network, inputs.batch
        drop_key, path_key, thin_key = jax.random.split(key, 3)
        rows, paths = self._rows, None
        if recipe.keep_tokens:
            rows = network.schedule.thin(thin_key, recipe.keep_tokens)
        if recipe.drop_path:
            paths = drop_paths(path_key, network.depth, batch, recipe.drop_path)
        losses = tokens.token_losses(
            network,
            self.tokenizer.codes,
            params,
            self._targets(frozen, inputs, key),
            self._drop_conditions(params, frozen, inputs, drop_key),
            rows=rows,
            paths=paths,
            smoothing=recipe.label_smoothing,
            of_bits=recipe.bit_loss,
            tables=inputs.tables,
            noise_key=jax.random.fold_in(key, NOISE) if network.drops else None,
        )
        count = losses.trained_BL.shape[1]
        weights_L = tokens.token_weights(network.schedule, count, recipe.balance)
        value = recipe.loss_scale * (weights_L * losses.trained_BL).mean()
        trained_L, nll_L, hit_L = (loss_BL.mean(0) for loss_BL in losses)
        metrics = tokens.mean_per_scale(network.schedule, nll_L, hit_L)
        return value, metrics | {'loss': trained_L.mean()}

    def score(self, params: Any, frozen: Frozen, inputs: StepInputs, key: jax.Array) -> TokenLosses:
        """The losses of all trained scales, [B, L], with nothing dropped and nothing smoothed.

        Give the same key for every model, so that held-out losses compare.
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

    @property
    def _rows(self) -> np.ndarray | None:
        """The rows of the trained scales; None for all."""
        scales = self.recipe.scales
        return self.network.schedule.leading_rows(scales) if scales else None

    @property
    def _network(self) -> Transformer:
        return self.network.with_batch_groups(self.batch_groups)

    def _targets(self, frozen: Frozen, inputs: StepInputs, key: jax.Array) -> Targets:
        """Inputs and labels of a batch."""
        if isinstance(inputs.encoded, Targets):
            return inputs.encoded
        return tokens.teacher_forcing(self.tokenizer, frozen.tokenizer, inputs.encoded, key)

    def _drop_conditions(
        self, params: Any, frozen: Frozen, inputs: StepInputs, key: jax.Array
    ) -> Any:
        """The conditions of a batch, with the unprompted one in some rows at random."""
        prompted = self.condition(frozen, inputs)
        unprompted = bind(self.network, params).unprompted(prompted, frozen.empty)
        drop_B = jax.random.bernoulli(key, self.recipe.condition_drop, (inputs.batch,))
        return conditions.choose(drop_B, prompted, unprompted)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RefinementProgram(TrainingProgram):
    """The programs that train the refinement head of a model whose other parameters are frozen.

    Attributes:
        unmasking: which tokens are shown, and the loss of the hidden ones.
    """

    unmasking: Unmasking

    def trained(self, params: Any) -> Any:
        """The parameters of the head."""
        return params[REFINER]

    def base(self, params: Any) -> Any:
        """The parameters below the head."""
        return {name: part for name, part in params.items() if name != REFINER}

    def model_params(self, params: Any, frozen: Frozen) -> Any:
        """The parameters of head and base model."""
        return frozen.base | {REFINER: params}

    def loss(
        self, params: Any, frozen: Frozen, inputs: StepInputs, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """The loss of the hidden tokens, and its metrics (STAR specification 9.1)."""
        drop_key, path_key, show_key = jax.random.split(key, 3)
        batch, rows = inputs.batch, refinement.refined_rows(self.network)
        shown_BR = self.unmasking.sample(show_key, (batch, len(rows)))
        paths = None
        if self.unmasking.noisy_base and self.recipe.drop_path:
            paths = drop_paths(path_key, self.network.depth, batch, self.recipe.drop_path)
        params = self.model_params(params, frozen)
        condition = self._drop_conditions(params, frozen, inputs, drop_key)
        targets = self._targets(frozen, inputs, key)
        logits_BRV = self._logits(
            params, frozen, targets, shown_BR, condition=condition, paths=paths
        )
        codes_BR, schedule = targets.codes_BL[:, rows], self.network.schedule
        value = self.unmasking.loss(logits_BRV, codes_BR, shown_BR, schedule.length)
        sums_3R = refinement.hidden_sums(logits_BRV, codes_BR, shown_BR).sum(1)
        return value, refinement.mean_per_scale(schedule, rows, sums_3R) | {'loss': value}

    def score(self, params: Any, frozen: Frozen, inputs: StepInputs, key: jax.Array) -> jax.Array:
        """`hidden_sums` [3, B, R] of a batch, of which the key hides tokens."""
        rows = refinement.refined_rows(self.network)
        shown_BR = self.unmasking.sample(key, (inputs.batch, len(rows)))
        targets = self._targets(frozen, inputs, key)
        params, condition = self.model_params(params, frozen), self.condition(frozen, inputs)
        logits_BRV = self._logits(params, frozen, targets, shown_BR, condition=condition)
        return refinement.hidden_sums(logits_BRV, targets.codes_BL[:, rows], shown_BR)

    def _logits(
        self,
        params: Any,
        frozen: Frozen,
        targets: Targets,
        shown_BR: jax.Array,
        *,
        condition: Any,
        paths: jax.Array | None = None,
    ) -> jax.Array:
        """The head's logits [B, R, V]."""
        codes_BR = targets.codes_BL[:, refinement.refined_rows(self.network)]
        vectors_BRC = refinement.shown_vectors(self.tokenizer, frozen.tokenizer, codes_BR, shown_BR)
        inputs = (self._network, params, targets.inputs_BLC, vectors_BRC, condition)
        return refinement.refine(*inputs, paths=paths)[1]
