"""Which contracts do the parts of this package keep?

A part is anything that has these methods and attributes; it needs no base class. Concrete types are
imported for their names alone, so that every room may import this file.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import jax
import numpy as np

if TYPE_CHECKING:
    from star_jax.core.codes import Codes, Sampled
    from star_jax.core.guidance import StepSettings
    from star_jax.core.schedule import Schedule, Step
    from star_jax.core.settings import Settings


class StepFns(NamedTuple):
    """What a sampling method may call, closed over the parameters of network and tokenizer.

    R rows are B prompted ones, or B prompted over B unprompted ones.

    Attributes:
        codes: how logits become codes.
        head: features [R, L, D] -> float32 logits [R, L, *codes.shape, V].
        embed: codes [B, L, *codes.shape] -> vectors [B, L, C].
        mix: weights [B, L, V] -> weighted means of the code vectors [B, L, C].
        refine: (vectors of fixed tokens [R, L, C], features, step) -> logits of the refinement
            head, as of `head`.
        trace: return a `MethodTrace`.
    """

    codes: Codes
    head: Callable[[jax.Array], jax.Array]
    embed: Callable[[jax.Array], jax.Array]
    mix: Callable[[jax.Array], jax.Array]
    refine: Callable[[jax.Array, jax.Array, Step], jax.Array] | None = None
    trace: bool = False


class MethodTrace(NamedTuple):
    """What a sampling method computed in one step, float32.

    Attributes:
        logits: [R, L, ..., V] of all rows, before guidance.
        guided: [B, L, ..., V], before temperature and filter.
        probs: [B, L, ..., V], after both: what codes are sampled from.
        passes: the trace of every pass, for methods that take several.
    """

    logits: jax.Array
    guided: jax.Array
    probs: jax.Array
    passes: Any = None


class Filter(Protocol):
    """Which codes may be sampled. A pytree: numbers are leaves, the rest is static."""

    def __call__(self, logits: jax.Array, temperature: float | jax.Array) -> jax.Array:
        """Logits [..., V] -> float32 logits at `temperature`, -inf where a code is removed."""


class SamplingMethod(Protocol):
    """How the codes of a step are sampled from its features.

    A pytree: numbers are leaves, rules are static. It must be pure, and image b may depend on key b
    and on the rows of image b alone.
    """

    def kind(self, step: int) -> Hashable:
        """How `step` is sampled: neighbouring steps of equal kind may share a loop body."""

    def __call__(
        self,
        keys_B: jax.Array,
        features_RLD: jax.Array,
        settings: StepSettings,
        step: Step,
        step_fns: StepFns,
    ) -> tuple[Sampled, MethodTrace | None]:
        """Samples the tokens of one step.

        Args:
            keys_B: one key per image, already folded with the step.
            features_RLD: of B prompted rows, or of B prompted over B unprompted ones.
            settings: scalars of this step.
            step: the step, traced where steps share a loop body.
            step_fns: functions of network and tokenizer.

        Returns:
            Codes and vectors; a trace if `step_fns.trace`.
        """


class Family(Protocol):
    """The config of a family of networks: which parts make one, and how it is sampled.

    Attributes:
        schedule: the order in which tokens are predicted.
        refinement: the config of the head of stable sampling; None: there is none.
    """

    @property
    def schedule(self) -> Schedule: ...

    @property
    def refinement(self) -> Any | None: ...

    def guidance_weights(self, guidance: float) -> np.ndarray:
        """[S] float32 weights of `core.guidance.guide`, from the published guidance number.

        All are 0 where that number turns guidance off.
        """

    def temperatures(self, temperature: float) -> np.ndarray:
        """[S] float32 temperatures, from a user's temperature."""

    def filter(self, settings: Settings) -> Filter:
        """Which codes may be sampled under a user's settings."""
