"""How is the refinement head of a model trained, and nothing else of it?"""

import functools
import re
from typing import Any

import jax
import numpy as np

from star_jax.checkpoint import config, models, weights
from star_jax.data import pipeline
from star_jax.errors import UserError
from star_jax.parallel import rules
from star_jax.protocols import Family
from star_jax.training import refinement
from star_jax.training.programs import HEAD, HeadPrograms
from star_jax.training.run import Run
from star_jax.training.state import (
    TrainState,
    abstract_sharded,
    averaged,
    fitted,
    go_on_from,
    init_sharded,
)
from star_jax.training.transformer import TransformerJob

OWN = ('refinement', 'drop_path', 'keep_tokens')  # fields in which the frozen model may differ


class HeadJob(TransformerJob):
    """The head of `run.model`, on the frozen model of `run.init`.

    State, averages and checkpoints hold the head alone; the model folder at the end is whole.
    """

    PROGRAMS = HeadPrograms

    def __init__(self, run: Run) -> None:
        if not run.init:
            raise UserError(
                'model.refinement asks for a head on a trained model, and there is none: name its '
                'folder with --init, or train the model first, without model.refinement'
            )
        begun = models.read(run.init)
        _check_config(run, begun.config)
        super().__init__(run)
        if begun.text and begun.text.sha256 != self.encoder.sha256:
            raise UserError(
                f'{run.init} was trained with the text encoder of sha256 {begun.text.sha256}, but '
                f'{run.text} has {self.encoder.sha256}: name that one with --text'
            )
        given = dict(begun.params)
        self._begun = given.pop(HEAD, None)
        base = abstract_sharded(self.programs.init_base, self.mesh)
        fit = weights.unflatten(weights.fit(weights.flatten(given), base, run.init))
        where = jax.tree.map(lambda leaf: leaf.sharding, base)
        self.frozen['base'] = rules.shard(fit, where)

    @functools.cached_property
    def base(self) -> str:
        return models.digest(self.run.init)

    def init(self) -> TrainState:
        """A fresh head, or that of `run.init` if it has one."""
        state = init_sharded(self.programs.build, self.mesh, jax.random.key(self.run.seed))
        if self._begun is None:
            return state
        return go_on_from(state, fitted(self._begun, self.abstract(), self.run.init))

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Loss and accuracy of hidden tokens, the same ones every time, of the validation set."""
        sums_3L = 0.0
        batches = pipeline.padded(self.validation, self.run.batch, self._rows)
        for number, (batch, real) in enumerate(batches):
            key = jax.random.fold_in(jax.random.key(0), number)
            told = self._score(averaged(state), self.frozen, self._batch(batch), key)
            sums_3L += np.asarray(told)[:, :real].sum(1)
        rows = refinement.refined_rows(self.model)
        scalars = refinement.scales(self.model.schedule, rows, sums_3L)
        return {f'validation/{name}': float(value) for name, value in scalars.items()}

    def _weights(self, state: TrainState) -> Any:
        return self.frozen['base'] | {HEAD: averaged(state)}


def _check_config(run: Run, begun: Family) -> None:
    """Raises UserError unless `begun`, the model of `run.init`, is that of the run without head."""
    found = config.differences(begun, run.model)
    changed = [f'model.{one}' for one in found if re.split('[.:]', one)[0] not in OWN]
    if changed:
        raise UserError(
            f'{run.init} is another model than that of the run ({"; ".join(changed)}): a head is '
            'trained on a frozen model, so give the config that it was trained with'
        )
