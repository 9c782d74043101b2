"""Which programs train a transformer?

They follow from the run, the sizes of the tokenizer and what reads prompts; no weights and no data
are needed, so that a plan compiles what a job runs.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from star_jax.core.classes import Classes
from star_jax.core.condition import Condition
from star_jax.losses import tokens
from star_jax.nn.attention_dispatch import named
from star_jax.parallel import rules
from star_jax.parallel.mesh import batch_shards
from star_jax.protocols import TokenizerConfig
from star_jax.text import TextEncoder
from star_jax.training import refinement
from star_jax.training import step as steps
from star_jax.training.optimizer import decayed, everything
from star_jax.training.run import Run
from star_jax.training.state import TrainState, abstract_sharded, build_state

HEAD = 'refiner'  # its name among the parameters of a model


class Programs:
    """Those of a whole transformer.

    `inside` says that prompts are encoded within the training program, `platform` for whose devices
    ('cpu', 'gpu', 'tpu') kernels are chosen. Every method takes `frozen`:
    the parameters of the tokenizer and of the encoder, and the `empty` prompt's condition.
    """

    def __init__(
        self,
        run: Run,
        mesh: Mesh,
        vq: TokenizerConfig,
        encoder: TextEncoder | Classes | None,
        *,
        inside: bool,
        platform: str,
    ) -> None:
        self.run, self.mesh, self.encoder, self.inside = run, mesh, encoder, inside
        self._parts = (mesh, vq, encoder)
        self._options = {'inside': inside, 'platform': platform}
        self.tokenizer = vq.build()
        attend = named(run.attention, platform)
        self.model = run.model.build(run.dtype, run.remat, run.unroll, attend).with_sharding(mesh)
        self.optimizer = run.optimizer.build(run.pace.steps)
        self._recipe = recipe(run, batch_shards(mesh))
        self._taught = self.model.with_batch_groups(batch_shards(mesh))

    @functools.cached_property
    def plain(self) -> 'Programs':
        """The same programs as their arithmetic is counted: nothing is computed twice, and
        attention in no kernel that hides what it does."""
        run = dataclasses.replace(self.run, remat=False, attention='by_scale')
        return type(self)(run, *self._parts, **self._options)

    def build(self, key: jax.Array) -> TrainState:
        """The (boxed) state before step 0."""
        return build_state(self.init, self.optimizer, self.run.ema > 0, key)

    def init(self, key: jax.Array) -> Any:
        """The (boxed) parameters that are trained."""
        schedule = self.model.schedule
        later = schedule.starts[-1] - schedule.starts[1]
        inputs = jnp.zeros((1, later, self.run.model.channels))
        condition = self.run.model.abstract_condition()
        condition = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), condition)
        return self.model.init(key, inputs, condition)['params']

    def abstract(self) -> TrainState:
        """Shapes, dtypes and shardings of the state.

        Raises UserError naming the first array that the mesh does not divide.
        """
        return abstract_sharded(self.build, self.mesh)

    @functools.cached_property
    def encode(self) -> Any:
        """Compiled: the tokenizer's parameters and uint8 images [B, H, W, 3] to codes [B, L]."""
        encode = functools.partial(tokens.encode, self.tokenizer)
        return jax.jit(encode, out_shardings=rules.batch_sharding(self.mesh))

    def train(
        self, state: TrainState, frozen: dict, batch: dict[str, Any], key: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """One update by a batch of codes and text, and its scalars."""
        parts = (self._taught, self.tokenizer, self.optimizer, self._recipe)
        told = (frozen['tokenizer'], batch['codes'], self.condition(frozen, batch), frozen['empty'])
        return steps.train(*parts, state, *told, key)

    def score(
        self, params: Any, frozen: dict, batch: dict[str, Any]
    ) -> tuple[jax.Array, jax.Array]:
        """Negative log-likelihood and hit of every token of a batch, [B, L]."""
        args = (params, frozen['tokenizer'], batch['codes'], self.condition(frozen, batch))
        return tokens.score(self._taught, self.tokenizer, *args)

    def condition(self, frozen: dict, batch: dict[str, Any]) -> Condition:
        """What the text of a batch says."""
        if self.inside:
            text = self.encoder.apply(frozen['encoder'], batch['text'])
            return self.model.sharding.constrain_batch(text)
        return batch['text']


class HeadPrograms(Programs):
    """Those of a refinement head, on a model whose parameters are the frozen `base`."""

    def __init__(self, run: Run, *parts: Any, **options: Any) -> None:
        super().__init__(run, *parts, **options)
        mask = everything if run.unmasking.decay_all else decayed
        self.optimizer = run.optimizer.build(run.pace.steps, mask)

    def init(self, key: jax.Array) -> Any:
        """The (boxed) parameters of the head."""
        return super().init(key)[HEAD]

    def init_base(self, key: jax.Array) -> Any:
        """The (boxed) parameters of the model below it."""
        return {name: part for name, part in super().init(key).items() if name != HEAD}

    def train(
        self, state: TrainState, frozen: dict, batch: dict[str, Any], key: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """One update of the head by a batch of codes and text, and its scalars."""
        recipe = (self.optimizer, self._recipe, self.run.unmasking)
        text = self.condition(frozen, batch)
        told = (frozen['tokenizer'], frozen['base'], batch['codes'], text, frozen['empty'])
        return refinement.train(self._taught, self.tokenizer, *recipe, state, *told, key)

    def score(self, head: Any, frozen: dict, batch: dict[str, Any], key: jax.Array) -> jax.Array:
        """[3, B, R]: negative log-likelihood, hit and 1 of every refined token that is hidden."""
        codes_BL, rows = batch['codes'], refinement.refined_rows(self.model)
        shown_BL = self.run.unmasking.draw(key, (len(codes_BL), len(rows)))
        params, text = frozen['base'] | {HEAD: head}, self.condition(frozen, batch)
        args = (params, frozen['tokenizer'], codes_BL, shown_BL, text)
        logits_BLV = refinement.score(self._taught, self.tokenizer, *args)
        return refinement.hidden_sums(logits_BLV, codes_BL[:, rows], shown_BL)


def recipe(run: Run, ways: int) -> steps.Recipe:
    """What the steps of a run do, whose batch is split in so many ways."""
    scaled = run.released_loss_scale and run.model.keep_tokens
    return steps.Recipe(
        condition_drop=run.caption_drop,
        drop_path=run.model.drop_path,
        keep_tokens=run.model.keep_tokens,
        balance=run.balance,
        loss_scale=run.batch // ways if scaled else 1.0,
        ema=run.ema,
    )
