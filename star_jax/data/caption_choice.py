"""Which text of an image is its caption in a training step?"""

import dataclasses

import numpy as np

from star_jax.core.argument_types import check_types
from star_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnyCaption:
    """Each of the captions of an image, equally often."""

    def choose(self, captions: tuple[str, ...], rng: np.random.Generator) -> str:
        """The caption of one training step."""
        return captions[int(rng.integers(len(captions)))]

    def texts(self, captions: tuple[str, ...]) -> tuple[str, ...]:
        """All texts that `choose` may return, the most detailed one first."""
        return captions


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShortOrLong:
    """The shortest caption, or the beginning of the most detailed one (Infinity specification 6).

    Attributes:
        short: probability of the last caption of an image, the shortest; otherwise it is the first.
        sentences: take a random number of the first sentences of the first caption, at least one;
            otherwise all of it.
        end: a caption ends before the first occurrence of this text ('': nowhere).
    """

    short: float = 0.5
    sentences: bool = True
    end: str = '--'

    def __post_init__(self) -> None:
        check_types(self)
        if not 0 <= self.short <= 1:
            raise UserError(f'short is a probability, not {self.short}')

    def choose(self, captions: tuple[str, ...], rng: np.random.Generator) -> str:
        """The caption of one training step."""
        if rng.random() < self.short:
            return self._without_end(captions[-1])
        beginnings = self._beginnings(captions[0])
        return beginnings[int(rng.integers(len(beginnings)))]

    def texts(self, captions: tuple[str, ...]) -> tuple[str, ...]:
        """All texts that `choose` may return, the most detailed one first."""
        longest_first = self._beginnings(captions[0])[::-1]
        return tuple(dict.fromkeys((*longest_first, self._without_end(captions[-1]))))

    def _without_end(self, caption: str) -> str:
        kept = caption.partition(self.end)[0] if self.end else caption
        return kept.strip() or caption

    def _beginnings(self, caption: str) -> list[str]:
        """The first sentence of a caption, the first two, and so on to all."""
        caption = self._without_end(caption)
        sentences = [part for part in caption.split('.') if part.strip()]
        if not self.sentences or len(sentences) < 2:
            return [caption]
        return ['.'.join(sentences[: n + 1]) + '.' for n in range(len(sentences))]


@dataclasses.dataclass(frozen=True, kw_only=True)
class WholeOrFirstSentence:
    """The most detailed caption, or what precedes its first full stop (LlamaGen specification 4.3).

    Attributes:
        first: probability of the beginning alone, without the full stop.
    """

    first: float = 0.3

    def __post_init__(self) -> None:
        check_types(self)
        if not 0 <= self.first <= 1:
            raise UserError(f'first is a probability, not {self.first}')

    def choose(self, captions: tuple[str, ...], rng: np.random.Generator) -> str:
        """The caption of one training step."""
        return self.texts(captions)[-1] if rng.random() < self.first else captions[0]

    def texts(self, captions: tuple[str, ...]) -> tuple[str, ...]:
        """All texts that `choose` may return, the most detailed one first."""
        whole = captions[0]
        return tuple(dict.fromkeys((whole, whole.partition('.')[0].strip() or whole)))


CaptionChoice = AnyCaption | ShortOrLong | WholeOrFirstSentence

ANY_CAPTION = AnyCaption()
