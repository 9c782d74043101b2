"""What has a unit of a study of runs measured?"""

import dataclasses
from typing import Any

from star_jax.core.argument_types import OMITTED
from star_jax.core.settings import Settings
from star_jax.errors import UserError
from star_jax.studies.aligned import Aligned, right
from star_jax.studies.held_out import POINTS, HeldOut


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerResult:
    """The result of training a tokenizer.

    Attributes:
        study: the name of the study.
        tokenizer: the name of the tokenizer.
        commit: commit of the code.
        images: images of the training.
        hardware: the machines, as `machine.describe` describes them.
        tokenizer_digest: SHA-256 of the folder of the tokenizer ('' after a failure, and in older
            results).
        psnr: mean of the reconstructions of validation images, dB; None after a failure.
        failure: why the training failed ('': it did not).
        seconds: time of all starts of the training, in every study that shares it; older results
            have the time since the last start.
    """

    study: str
    tokenizer: str
    commit: str
    images: int
    hardware: tuple[dict[str, Any], ...]
    tokenizer_digest: str = dataclasses.field(default='', metadata=OMITTED)
    psnr: float | None = None
    failure: str = ''
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunResult:
    """The result of one contender with one seed.

    Attributes:
        study: the name of the study.
        contender: the name of the contender.
        baseline: the name of the first contender of the study, with which the others are compared.
        seed: the seed.
        commit: commit of the code.
        images: images of the training.
        hardware: the machines, as `machine.describe` describes them.
        settings: digest of the run and of how its images are sampled.
        tokenizer: the name of its tokenizer ('' in older results).
        tokenizer_digest: SHA-256 of the folder of this tokenizer ('' in older results).
        parameters: trained parameters.
        tokens: tokens of an image.
        numbers: numbers of the code of a token: its bits, or 1 for an index.
        curve: held-out scores at equally spaced points of the training, the last at its end; the
            loss of a token of bits is the mean over them.
        aligned: alignment of sampled images, by number of objects.
        sampling: the settings with which these images were sampled.
        failure: why the training failed ('': it did not); the scores are then missing.
        seconds: time of all starts of the `unit`; older results have the time since the last start,
            of the `training`, too.
    """

    study: str
    contender: str
    baseline: str
    seed: int
    commit: str
    images: int
    hardware: tuple[dict[str, Any], ...]
    settings: str
    tokenizer: str = dataclasses.field(default='', metadata=OMITTED)
    tokenizer_digest: str = dataclasses.field(default='', metadata=OMITTED)
    parameters: int
    tokens: int
    numbers: int
    curve: tuple[HeldOut, ...] = ()
    aligned: tuple[Aligned, ...] = ()
    sampling: Settings | None = None
    failure: str = ''
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.failure and len(self.curve) != POINTS:
            raise UserError(f'the curve has {len(self.curve)} points, expected {POINTS}')

    @property
    def nats(self) -> float:
        """Held-out loss of an image at the end, nats: comparable between bits and indices."""
        return self.curve[-1].loss * self.numbers * self.tokens

    @property
    def share(self) -> float:
        """Share of all sampled images that show what their prompts state."""
        return right(self.aligned)
