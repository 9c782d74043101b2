"""Interfaces: what do families, tokenizers, prompt encoders and samplers implement?

A family is a config that builds a network; a tokenizer config builds a tokenizer. Training of
transformers, sampling, planning, benchmarks, model folders and evaluation of samples call the
members written here and nothing else of them; training and evaluation of a tokenizer call those of
`TrainedTokenizer`, too. (Conversion has a table per family.) `Family` and
`TokenizerConfig` are base classes with defaults: a config from outside of this package derives from
them and is registered in `families.registry`. All others are structural.
"""

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, Self

import jax
import numpy as np
from flax import linen as nn

from star_jax.core.cache import KV
from star_jax.core.codes import Codes, Sampled, Targets
from star_jax.core.guidance import StepSettings
from star_jax.core.schedule import Schedule, Step
from star_jax.core.self_correction import PLAIN, SelfCorrection
from star_jax.core.settings import Dtype, Remat, Settings, check_divisor
from star_jax.core.templates import Templates
from star_jax.core.visibility import ALL, Visibility
from star_jax.errors import UserError

PromptField = Literal['caption', 'label']
CrossAttentionMode = Literal['as_trained', 'released', 'corrected']


class PromptEncoder(Protocol):
    """Turns prompts into the condition of a network: a text encoder, or a table of classes.

    Attributes:
        field: which field of an example it reads.
        width: channels of text features, 0 if it reads no text.
        params: its parameters on the devices, empty if nothing is computed.
        identity: hex digest of everything that decides the condition of a prompt.
        sha256: hex digest of its files, '' if it has none.
    """

    field: PromptField

    @property
    def width(self) -> int: ...

    @property
    def params(self) -> Any: ...

    @property
    def identity(self) -> str: ...

    @property
    def sha256(self) -> str: ...

    def reference(self) -> dict[str, str] | None:
        """How a model folder names it, or None if the model's own config holds it."""

    def tokenize(self, prompts: Sequence[str]) -> Any:
        """The host's part: a pytree of numpy arrays with one row per prompt."""

    def apply(self, params: Any, tokens: Any) -> Any:
        """The device's part, pure: the condition of those tokens."""

    def encode(self, prompts: Sequence[str]) -> Any:
        """Both parts: the condition of any number of prompts, in numpy arrays."""

    def abstract_params(self) -> Any:
        """Shapes of `params`, boxed with logical axes."""

    def abstract_tokens(self, rows: int) -> Any:
        """Shapes of the tokens of so many prompts."""


class LoadEncoder(Protocol):
    """Loads the text encoder of a run or of a stored model: `text.encoder.load` of its source."""

    def __call__(self, *, most: int | None = None) -> PromptEncoder:
        """The encoder.

        Args:
            most: tokens of a prompt that the model reads (None: the default of the encoder).

        Raises:
            UserError: the encoder is not available, or does not give so few tokens.
        """


class Starter(Protocol):
    """The module that makes the first rows of a network from its condition.

    The condition is any pytree of arrays with one row per image; only the starter reads it.
    """

    def __call__(self, condition: Any) -> jax.Array:
        """[B, rows of step 0, D] float32: the text prefix, if the family has one, comes first."""

    def text(self, condition: Any) -> tuple[jax.Array | None, jax.Array | None]:
        """Token states [B, T, E] for cross-attention and how many of each image are visible, [B].

        The visible ones come first. (None, None) without text.
        """

    def padding(self, condition: Any) -> jax.Array | None:
        """[B] int32: rows at the start of each image's prefix that are padding, or None."""

    def summary(self, condition: Any) -> jax.Array | None:
        """[B, D] float32: one vector per image for modulation, or None."""

    def unprompted(self, condition: Any, empty: Any) -> Any:
        """The condition of as many images without a prompt.

        Args:
            condition: the condition of the prompted images.
            empty: the encoded empty prompt, one row.
        """


class Tokenizer(Protocol):
    """A tokenizer module: images <-> codes, and the canvas between them.

    Images are NHWC float32 in [-1, 1]. A canvas is what the decoder reads; a step of sampling adds
    its tokens to it and computes the inputs of the next step from it.

    Attributes:
        schedule: steps and grids.
        codes: how the flat output of a head becomes codes.
        resolution: (height, width) of the images in pixels.
    """

    schedule: Schedule
    codes: Codes
    resolution: tuple[int, int]

    def encode(self, images_BHWc: jax.Array) -> jax.Array:
        """Codes or features: a cache on disk holds them, and training starts from them."""

    def training_targets(self, encoded: jax.Array, key: jax.Array) -> Targets:
        """Inputs and labels of teacher forcing; the key is for families that perturb them."""

    def inputs(self, codes_BL: jax.Array) -> jax.Array:
        """[B, L - n_0, C]: inputs of all steps but the first; equals folding `advance`."""

    def embed(self, codes_BL: jax.Array) -> jax.Array:
        """[B, L, C] vectors of codes."""

    def mix(self, weights: jax.Array) -> jax.Array:
        """[B, L, C]: means of the code vectors, weighted by probabilities [B, L, V]."""

    def blank(self, batch: int) -> Any:
        """The canvas before the first step."""

    def advance(self, canvas: Any, sampled: Sampled, step: Step) -> tuple[Any, jax.Array | None]:
        """The canvas with a step's tokens, and the next step's inputs (None after the last).

        Args:
            canvas: the canvas after the steps before.
            sampled: codes [B, L of the step, *codes.shape] and vectors [B, L of the step, C].
            step: the step.
        """

    def following(self, canvas: Any, step: Step) -> jax.Array | None:
        """The inputs of the step after `step`, [B, L, C]; None after the last.

        Only schedules whose steps may share a bucket need it.
        """

    def decode(self, canvas: Any) -> jax.Array:
        """[B, H, W, 3] images in [-1, 1]."""

    def to_uint8(self, images_BHWc: jax.Array) -> jax.Array:
        """uint8 images, rounded as the family's published code rounds."""


class QuantisedMaps(Protocol):
    """The result of a quantiser, a dataclass; gradients flow through it.

    A result with a codebook also has `targets`, the vectors [B, h, w, C] of every scale whose
    nearest code was searched; a result of bits has `residuals`, what their signs were taken of.

    Attributes:
        canvases: [B, h, w, C] after every scale; the last is what the decoder reads.
    """

    canvases: tuple[jax.Array, ...]

    def losses(self, f: jax.Array, commitment: float) -> jax.Array:
        """[K]: the losses of each scale for the features f, commitment weighted."""

    def straight_through(self, f: jax.Array) -> jax.Array:
        """The last canvas, with the gradient that trains the encoder."""


class TrainedTokenizer(Tokenizer, Protocol):
    """A tokenizer module that can be trained.

    Its parameters have `encoder` and `decoder`, whose last layer is `decoder/conv_out`. A codebook
    is the parameter `quantiser/codebook`; then the module has `distances`.
    """

    def features(self, images_BHWc: jax.Array) -> jax.Array:
        """[B, H, W, 3] in [-1, 1] -> [B, h, w, C]: the features to quantise."""

    def quantise(self, f: jax.Array) -> QuantisedMaps:
        """The codes of features, and their canvases."""

    def labels(self, quantised: QuantisedMaps) -> Sequence[jax.Array]:
        """Per scale [B, ..., *codes.shape]: the codes, for counting."""

    def decode_unclamped(self, canvas: jax.Array) -> jax.Array:
        """The decoder's image, not clamped."""


class Kernel(Protocol):
    """Computes attention. Each kernel chooses how it combines the pieces of the keys."""

    def __call__(
        self, q_BLNH: jax.Array, past: tuple[KV, ...], new: KV, visibility: Visibility = ALL
    ) -> jax.Array:
        """softmax(q k) v per head over the keys that each row attends to.

        Args:
            q_BLNH: the queries of L rows, scaled already. N divides by the number of key/value
                heads.
            past: the keys and values of earlier rows in the order of their numbers, in any number
                of pieces; empty in training.
            new: the keys and values that follow, from the same L rows or from a text.
            visibility: which of all these keys each row attends to.

        Returns:
            [B, L, N, H] in the dtype of the values.
        """


class StepFns(NamedTuple):
    """Functions for a sampling method, closed over the parameters of network and tokenizer.

    Arrays with R rows hold B conditional rows, or B conditional rows and then B unconditional ones.

    Attributes:
        codes: how logits become codes.
        head: features [R, L, D] -> float32 logits [R, L, *codes.shape, V].
        embed: codes [B, L, *codes.shape] -> vectors [B, L, C].
        mix: weights [B, L, V] -> weighted means of the code vectors [B, L, C].
        refine: (vectors of fixed tokens [R, L, C], features, step) -> logits of the refinement
            head, as for `head`.
        trace: return a `MethodTrace`.
    """

    codes: Codes
    head: Callable[[jax.Array], jax.Array]
    embed: Callable[[jax.Array], jax.Array]
    mix: Callable[[jax.Array], jax.Array]
    refine: Callable[[jax.Array, jax.Array, Step], jax.Array] | None = None
    trace: bool = False


class MethodTrace(NamedTuple):
    """The arrays that a sampling method computed in one step, float32.

    Attributes:
        logits: [R, L, ..., V] of all rows, before guidance.
        guided: [B, L, ..., V], before temperature and filter.
        probs: [B, L, ..., V], after both: codes are sampled from them.
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
            features_RLD: of B conditional rows, or of B conditional and then B unconditional rows.
            settings: scalars of this step.
            step: the step, traced where steps share a loop body.
            step_fns: functions of network and tokenizer.

        Returns:
            Codes and vectors; a trace if `step_fns.trace`.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Sizes of a tokenizer, and `build`.

    Attributes:
        has_codebook: codes are learned vectors, which training can start and restart.
    """

    has_codebook: ClassVar[bool] = True

    @property
    def schedule(self) -> Schedule:
        """Steps and grids of an image."""
        raise NotImplementedError

    @property
    def vocabulary(self) -> Codes:
        """The codes of one token."""
        raise NotImplementedError

    @property
    def vector_width(self) -> int:
        """Channels of a code vector and of the network's inputs."""
        raise NotImplementedError

    @property
    def resolution(self) -> tuple[int, int]:
        """(height, width) of the images in pixels."""
        raise NotImplementedError

    def at(self, schedule: Schedule) -> Self:
        """The same tokenizer for another schedule; UserError where its parameters do not fit."""
        raise NotImplementedError

    def build(self, dtype: Dtype = 'float32') -> nn.Module:
        """The `Tokenizer` module, whose decoder has activations of `dtype`."""
        raise NotImplementedError

    def build_training(
        self, correction: SelfCorrection = PLAIN, features: bool = False
    ) -> nn.Module:
        """The `Tokenizer` module for training.

        Args:
            correction: which codes its training targets flip.
            features: `encode` gives features; it always does where codes are flipped.

        Raises:
            UserError: the tokenizer has no such codes, or trains on no features.
        """
        if correction.active or features:
            raise UserError(
                f'a {type(self).__name__} tokenizer has no bits to flip and trains on codes: leave '
                'correction.strength at 0 and --features out'
            )
        return self.build()

    def abstract(self) -> dict:
        """Shapes of the parameters, boxed with logical axes."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """Sizes and parts of a transformer of one family, and `build`.

    Attributes:
        depth: layers of the network.
        width: channels of a row.
        heads: attention heads of queries.
        refinement: the head of stable sampling, for families that can have one.
        drop_path: rate of stochastic depth of the deepest layer.
        keep_tokens: tokens that a training step keeps (0: all).
        text_width: width of text features that the network reads (0: none).
        templates: the grids of images of other aspect ratios (empty: images have one size).
        constants: parameters ('/'-joined names) that stay as they are: saved and loaded, without
            gradient, weight decay, average or count.
    """

    depth: ClassVar[int]
    width: ClassVar[int]
    heads: ClassVar[int]
    refinement: ClassVar[Any] = None
    drop_path: ClassVar[float] = 0.0
    keep_tokens: ClassVar[int] = 0
    text_width: ClassVar[int] = 0
    templates: ClassVar[Templates] = Templates()
    constants: ClassVar[frozenset[str]] = frozenset()

    @property
    def schedule(self) -> Schedule:
        """Steps of an image, and rows that the network reads."""
        raise NotImplementedError

    @property
    def vocabulary(self) -> Codes:
        """The codes of one token; a tokenizer fits if its vocabulary is equal."""
        raise NotImplementedError

    @property
    def vector_width(self) -> int:
        """Channels of the network's inputs; a tokenizer fits if its width is equal."""
        raise NotImplementedError

    def at(self, schedule: Schedule) -> Self:
        """The same model for images of another schedule; UserError where its parameters differ."""
        raise UserError(f'a {type(self).__name__} has images of one size')

    def build(
        self,
        dtype: Dtype = 'float32',
        remat: Remat = 'none',
        unroll: int = 1,
        attend: Kernel = ...,
    ) -> nn.Module:
        """The network (`nn.transformer.Transformer`).

        Args:
            dtype: dtype of the activations.
            remat: activations that the backward pass recomputes (`core.settings`).
            unroll: layers compiled side by side.
            attend: the attention kernel (left out: the one that fits the platform).
        """
        raise NotImplementedError

    def abstract(self) -> dict:
        """Shapes of the parameters, boxed with logical axes."""
        raise NotImplementedError

    def abstract_inputs(self, batch: int = 1) -> jax.ShapeDtypeStruct:
        """Shapes of the network's inputs under teacher forcing."""
        schedule = self.schedule
        later = schedule.starts[-1] - schedule.starts[1]
        return jax.ShapeDtypeStruct((batch, later, self.vector_width), np.float32)

    def abstract_condition(self, batch: int = 1, tokens: int = 1) -> Any:
        """Shapes of the condition of `batch` prompts of `tokens` text tokens each."""
        raise NotImplementedError

    def default_tokenizer(self) -> TokenizerConfig:
        """The tokenizer that published models of this family use, at the sizes of this model."""
        raise NotImplementedError

    def prompt_encoder(self, load: LoadEncoder) -> PromptEncoder:
        """The encoder of prompts; a model of text returns the text encoder that `load` loads.

        Raises UserError where the encoder does not fit the model.
        """
        raise NotImplementedError

    def with_cross_attention(self, mode: CrossAttentionMode) -> Self:
        """The same model with published or corrected cross-attention.

        Raises UserError where the family has no such choice.
        """
        if mode == 'as_trained':
            return self
        raise UserError(
            f'a {type(self).__name__} has no published and no corrected cross-attention: '
            'leave cross_attention out'
        )

    def guidance_weights(self, guidance: float) -> np.ndarray:
        """[S] float32 weights w of every step, from a published guidance number.

        Logits are prompted + w (prompted - unprompted); all zero: only prompted rows are computed.
        """
        raise NotImplementedError

    def temperatures(self, temperature: float) -> np.ndarray:
        """[S] float32 temperatures of every step, from a user's temperature.

        Raises UserError for 0, by which no logits are divided.
        """
        check_divisor(temperature)
        return np.full(self.schedule.steps, temperature, np.float32)

    def filter(self, settings: Settings) -> Filter:
        """Which codes may be sampled under a user's settings."""
        raise NotImplementedError
