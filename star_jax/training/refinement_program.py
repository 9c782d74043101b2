"""Which programs train a refinement head?"""

import dataclasses
from typing import Any

import jax

from star_jax.core.codes import Targets
from star_jax.losses import refinement
from star_jax.losses.refinement import Unmasking
from star_jax.losses.tokens import Metrics
from star_jax.nn.transformer import Transformer
from star_jax.training.gradients import Parts
from star_jax.training.program import Frozen, PreparedBatch, StepInputs, TrainingProgram

REFINER = 'refiner'  # the name of a refinement head among the parameters of a model


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

    def prepare(
        self, frozen: Frozen, inputs: StepInputs, key: jax.Array
    ) -> tuple[PreparedBatch, jax.Array]:
        """A micro-batch as its loss reads it, and the weight of its loss (`Unmasking.weight`).

        Args:
            frozen: the arrays that do not change.
            inputs: the micro-batch.
            key: its key (`step_keys`).
        """
        drop_key, path_key, show_key = jax.random.split(key, 3)
        batch, rows = inputs.batch, refinement.refined_rows(self.network)
        shown_BR = self.unmasking.sample(show_key, (batch, len(rows)))
        noisy = self.unmasking.noisy_base and self.recipe.drop_path
        return PreparedBatch(
            targets=self._targets(frozen, inputs, key),
            condition=self.condition(frozen, inputs),
            dropped_B=jax.random.bernoulli(drop_key, self.recipe.condition_drop, (batch,)),
            paths_B2D=self._paths(path_key, batch) if noisy else None,
            shown_BR=shown_BR,
        ), self.unmasking.loss.weight(shown_BR)

    def loss(
        self, params: Any, frozen: Frozen, part: PreparedBatch, weight: jax.Array
    ) -> tuple[jax.Array, Parts]:
        """The share of a part of a micro-batch in the loss of the hidden tokens.

        STAR specification 9.1. The shares of all parts add up to the loss.

        Args:
            params: the parameters of the head.
            frozen: the arrays that do not change.
            part: the part, from `prepare`.
            weight: the weight of the loss of the whole micro-batch.

        Returns:
            The loss, and what `metrics` takes.
        """
        params = self.model_params(params, frozen)
        condition = self._drop_conditions(params, frozen, part)
        logits_BRV = self._logits(
            self._part_network,
            params,
            frozen,
            part.targets,
            part.shown_BR,
            condition=condition,
            paths=part.paths,
        )
        rows, loss = refinement.refined_rows(self.network), self.unmasking.loss
        codes_BR, shown_BR = part.targets.codes_BL[:, rows], part.shown_BR
        value = loss(logits_BRV, codes_BR, shown_BR, self.network.schedule.length)
        value *= loss.weight(shown_BR) / weight
        return value, (refinement.hidden_sums(logits_BRV, codes_BR, shown_BR).sum(1), value)

    def metrics(self, parts: Parts) -> Metrics:
        """The metrics of a micro-batch, from the sum of what `loss` returns of its parts."""
        sums_3R, value = parts
        schedule, rows = self.network.schedule, refinement.refined_rows(self.network)
        return refinement.mean_per_scale(schedule, rows, sums_3R) | {'loss': value}

    def score(self, params: Any, frozen: Frozen, inputs: StepInputs, key: jax.Array) -> jax.Array:
        """`hidden_sums` [3, B, R] of a batch, of which the key hides tokens."""
        rows = refinement.refined_rows(self.network)
        shown_BR = self.unmasking.sample(key, (inputs.batch, len(rows)))
        targets = self._targets(frozen, inputs, key)
        params, condition = self.model_params(params, frozen), self.condition(frozen, inputs)
        logits_BRV = self._logits(
            self._network, params, frozen, targets, shown_BR, condition=condition
        )
        return refinement.hidden_sums(logits_BRV, targets.codes_BL[:, rows], shown_BR)

    def _logits(
        self,
        network: Transformer,
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
        inputs = (network, params, targets.inputs_BLC, vectors_BRC, condition)
        return refinement.refine(*inputs, paths=paths)[1]
