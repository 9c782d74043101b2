"""How is the refinement head of a model trained, and nothing else of the model?"""

import functools
import re

import jax
import numpy as np

from star_jax.checkpoint import config, models, weights
from star_jax.data import pipeline
from star_jax.errors import UserError
from star_jax.losses import refinement
from star_jax.parallel import rules
from star_jax.protocols import Family
from star_jax.training.refinement_program import REFINER
from star_jax.training.run import Run
from star_jax.training.state import TrainState
from star_jax.training.transformer_job import TransformerJob

FREE_FIELDS = ('refinement', 'drop_path', 'keep_tokens')  # the frozen model may differ in these


class RefinementJob(TransformerJob):
    """Trains the head of `run.model`, on the frozen model of `run.init`.

    State, average and checkpoints hold the head alone; the model folder at the end is complete.
    """

    def __init__(self, run: Run) -> None:
        if not run.init:
            raise UserError(
                'model.refinement adds a head to a trained model, and there is none: name its '
                'folder with --init, or train the model first, without model.refinement'
            )
        model = models.read(run.init)
        _check_config(run, model.config)
        super().__init__(run)
        if model.text and model.text.sha256 != self.prompt_encoder.sha256:
            raise UserError(
                f'{run.init} was trained with the text encoder of sha256 {model.text.sha256}, but '
                f'{run.text} has {self.prompt_encoder.sha256}: name that one with --text'
            )
        params = dict(model.params)
        self._head = params.pop(REFINER, None)
        expected = rules.abstract(self.program.base(run.model.abstract()), self._mesh)
        params = weights.unflatten(weights.fit(weights.flatten(params), expected, run.init))
        shardings = jax.tree.map(lambda leaf: leaf.sharding, expected)
        self.frozen = self.frozen.replace(base=rules.shard(params, shardings))

    @functools.cached_property
    def base(self) -> str:
        """The digest of the frozen model."""
        return models.digest(self.run.init)

    def init(self) -> TrainState:
        """The state before step 0: a fresh head, or that of `run.init` if it has one."""
        return self._init(self._head, self.run.init)

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Loss and accuracy of hidden tokens of the validation set; always the same are hidden."""
        sums_3R = 0.0
        batches = pipeline.padded_batches(self.validation, self.run.batch, self._rows)
        for number, (batch, real) in enumerate(batches):
            key = jax.random.fold_in(jax.random.key(0), number)
            sums_3BR = self._score(state.averaged, self.frozen, self._inputs(batch), key)
            sums_3R += np.asarray(sums_3BR)[:, :real].sum(1)
        network = self.program.network
        rows = refinement.refined_rows(network)
        metrics = refinement.mean_per_scale(network.schedule, rows, sums_3R)
        return {f'validation/{name}': float(value) for name, value in metrics.items()}


def _check_config(run: Run, config_of_init: Family) -> None:
    """Raises UserError unless the model of `run.init` is that of the run without its head."""
    differences = config.differences(config_of_init, run.model)
    changed = [
        f'model.{difference}'
        for difference in differences
        if re.split('[.:]', difference)[0] not in FREE_FIELDS
    ]
    if changed:
        raise UserError(
            f'{run.init} is another model than that of the run ({"; ".join(changed)}): a head is '
            'trained on a frozen model, so give the config that it was trained with'
        )
