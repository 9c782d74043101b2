"""What is a training run?

A config file is one expression of these dataclasses, named `run`; the run's folder holds it as
`config.json`. Fields are plain data; `main` in `train.py` turns them into parts.
"""

import dataclasses
import statistics
from typing import Any, Literal

from star_jax.core.argument_types import check_types
from star_jax.core.schedule import Grids
from star_jax.core.self_correction import SelfCorrection
from star_jax.core.settings import Dtype, Remat, Settings
from star_jax.core.sizes import MAX_STEPS, MOST_LAYERS, check_sizes
from star_jax.data.caption_choice import AnyCaption, CaptionChoice
from star_jax.data.crops import WHOLE_IMAGES, Crops, RandomCrops
from star_jax.data.folder import Folder
from star_jax.data.prepared import Prepared
from star_jax.data.shapes import Shapes
from star_jax.data.splits import TEST
from star_jax.errors import UserError
from star_jax.families.star import Star
from star_jax.files import SHIPPED
from star_jax.losses.refinement import Unmasking
from star_jax.losses.tokens import BitReduction
from star_jax.nn.attention_dispatch import Name
from star_jax.parallel.mesh import MeshShape
from star_jax.protocols import Family, TokenizerConfig
from star_jax.text.encoder_folder import DEFAULT
from star_jax.tokenizers.residual_vq import VQ
from star_jax.training.objective import Objective
from star_jax.training.optimizer import AdamW

MAX_GRID = 1024  # images: more fit on no screen

Data = Shapes | Prepared | Folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pace:
    """How long a run is, and how often it reports and saves, all in training steps.

    Attributes:
        steps: training steps of the whole run.
        log: steps between two reports of the metrics.
        sample: steps between two evaluations: the metrics of the validation set, and a sample grid.
        images: images of a sample grid (0: no grids).
        save: steps between two checkpoints; a multiple of log.
        keep: number of newest checkpoints that are kept.
    """

    steps: int = 10_000
    log: int = 50
    sample: int = 1_000
    images: int = 16
    save: int = 500
    keep: int = 2

    def __post_init__(self) -> None:
        check_types(self)
        check_sizes(
            MAX_STEPS,
            steps=self.steps,
            log=self.log,
            sample=self.sample,
            save=self.save,
            keep=self.keep,
        )
        if not 0 <= self.images <= MAX_GRID:
            raise UserError(
                f'images of a sample grid must lie in [0, {MAX_GRID}] (0: none), not {self.images}'
            )
        if self.save % self.log:
            raise UserError(
                f'save ({self.save}) must be a multiple of log ({self.log}), so that a run that '
                'continues from a checkpoint reports the same means'
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SizeInTurn:
    """Training steps at another image size, in turn with those at the model's own.

    Attributes:
        grids: height and width of each scale in tokens, from coarse to fine.
        batch: images per micro-batch, over all devices.
    """

    grids: Grids
    batch: int

    def __post_init__(self) -> None:
        check_types(self)
        if self.batch < 1:
            raise UserError(f'batch must be at least 1, not {self.batch}')


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerRun:
    """The config of a run that trains an image tokenizer.

    Attributes:
        model: sizes of the tokenizer.
        data: training images.
        crops: random crops of enlarged training images.
        flip: probability of training on the mirror image of an image.
        validation: images of the validation metrics; without a path, a split of the training set.
        init: model folder to warm-start from ('': random weights); the codebook is kept if
            plain_steps is 0.
        only: the part that is trained: everything (''), or the decoder, which leaves every code
            of the tokenizer of init as it was.
        objective: weights and parts of the losses.
        optimizer: optimizer and its schedules.
        pace: length of the run, reports and checkpoints.
        batch: images per micro-batch, over all devices; a step trains on `optimizer.accumulate` of
            them.
        other_sizes: further image sizes of the same model: each step trains the next size in turn.
        plain_steps: steps without the quantiser at the start; then k-means initialises the
            codebook.
        restart_every: steps between two restarts of unused codes at current feature vectors.
        restart_until: share of the run after which unused codes are no longer restarted.
        ema: decay of the moving average of the parameters (0: none).
        dtype: dtype of the activations of encoder, decoder and discriminator, and of the sum of
            their gradients over devices, once per micro-batch: some losses (the entropy of codes)
            are of a whole micro-batch; statistics, the quantiser and losses are float32.
        mesh: devices along each mesh axis.
        seed: seed of the initial parameters and of the order of the data.
    """

    model: TokenizerConfig = VQ()
    data: Data = Shapes()
    crops: RandomCrops = WHOLE_IMAGES
    flip: float = 0.0
    validation: Data = Shapes(split='validation', count=512)
    init: str = ''
    only: Literal['', 'decoder'] = ''
    objective: Objective = Objective()
    optimizer: AdamW = AdamW(weight_decay=0.0)
    pace: Pace = Pace()
    batch: int = 64
    other_sizes: tuple[SizeInTurn, ...] = ()
    plain_steps: int = 500
    restart_every: int = 50
    restart_until: float = 0.6
    ema: float = 0.0
    dtype: Dtype = 'float32'
    mesh: MeshShape = MeshShape()
    seed: int = 0

    @property
    def sizes(self) -> tuple[SizeInTurn, ...]:
        """All sizes in turn, the model's own first."""
        own = SizeInTurn(grids=self.model.schedule.grids, batch=self.batch)
        return (own, *self.other_sizes)

    @property
    def mean_batch(self) -> float:
        """Images per step, on average over the sizes."""
        return self.optimizer.accumulate * statistics.fmean(size.batch for size in self.sizes)

    @property
    def quantised_from(self) -> int:
        """The first step with the quantiser."""
        return 0 if self.only else self.plain_steps

    def __post_init__(self) -> None:
        _check_common(self)
        if self.plain_steps < 0 or self.restart_every < 1:
            raise UserError(
                'plain_steps must not be negative and restart_every at least 1 '
                f'(restart_until 0 restarts none), not {self.plain_steps} and {self.restart_every}'
            )
        if self.only and not self.init:
            raise UserError(
                f'only {self.only!r} tunes a part of a trained tokenizer: name its folder with init'
            )
        self.objective.check(self.model)
        if not 0 <= self.flip <= 1:
            raise UserError(f'flip is a probability, not {self.flip}')
        if not 0 <= self.restart_until <= 1:
            raise UserError(f'restart_until is a share in [0, 1], not {self.restart_until}')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """The config of a run that trains a transformer on the codes of a frozen tokenizer.

    If the model has a refinement head, only that head is trained, on the frozen model of `init`.

    Attributes:
        model: family, sizes and parts of the transformer.
        init: model folder to warm-start from; it may have fewer scales ('': random weights).
        tokenizer: image tokenizer: a model folder, a hub id, or 'shipped' ('': that of init,
            otherwise the shipped one).
        text: text encoder: package:NAME, a folder, or a hub id (class-conditional models use none).
        text_dtype: dtype of the weights and activations of the text encoder; features are float32.
        text_features: from a cache (its encoder is on one device), or computed inside the program.
        cache: folder written by `star-jax data cache`, with codes and text features ('': images are
            encoded in every step, text features are cached in the user's cache folder).
        data: training images with captions.
        captions: which caption of an image a step takes: any of them equally often, the shortest or
            a beginning of the longest (Infinity), or the longest or its first sentence (LlamaGen);
            another kind is chosen in a config file.
        crops: crops of enlarged training images: at random places, or ten fixed ones (LlamaGen);
            another kind is chosen in a config file.
        validation: images of the validation metrics and sample grids; without a path, a split of
            the training set.
        optimizer: optimizer and its schedules.
        pace: length of the run, reports and checkpoints.
        batch: images per micro-batch, over all devices.
        caption_drop: probability of an image without its caption or class, for guidance.
        trained_scales: train on the first so many scales alone (0: all); sample such a model with
            sampling.stop.
        balance: weight of a scale in the loss: 0 weights all tokens equally, 1 weights all scales
            equally, so that the few tokens of coarse scales count more.
        label_smoothing: share of the uniform distribution over the codes in the labels of the
            trained loss; validation metrics are never smoothed.
        correction: bits that are flipped in training, so that later scales learn to repair
            mistakes (Infinity; published: strength 0.3).
        bit_loss: the loss of a token that is made of bits: the mean over them, or the sum.
        released_loss_scale: multiply the loss by the images per device when tokens are dropped
            (model.keep_tokens), as the published code does; gradients are then clipped more.
        unmasking: training of a refinement head.
        ema: decay of the moving average of the parameters (0: none).
        dtype: dtype of the activations; bfloat16 on accelerators.
        gradient_dtype: dtype in which the replicas (mesh.data) sum gradients, once per step.
        remat: which activations the backward pass computes again, which saves memory and costs
            time: none of them, all but the outputs of matrix products with weights (dots), or all
            but the input of each block (full).
        unroll: number of blocks compiled per iteration of the loop over blocks; more is faster for
            small blocks on CPUs, and compiles longer.
        attention: attention kernel: chosen by platform and shapes (automatic), reference formula
            (dense), one call per scale (by_scale), rows in chunks (chunked), or the kernel of a
            platform (flash: NVIDIA GPUs, half precision; splash: TPUs).
        sampling: sampling settings of the sample grids and of the exported model.
        mesh: devices along each mesh axis.
        seed: seed of the initial parameters and of the order of the data.
    """

    model: Family = Star()
    init: str = ''
    tokenizer: str = ''
    text: str = DEFAULT
    text_dtype: Dtype = 'float32'
    text_features: Literal['cached', 'inside'] = 'cached'
    cache: str = ''
    data: Data = Shapes()
    captions: CaptionChoice = AnyCaption()
    crops: Crops = WHOLE_IMAGES
    validation: Data = Shapes(split='validation', count=512)
    optimizer: AdamW = AdamW()
    pace: Pace = Pace()
    batch: int = 64
    caption_drop: float = 0.1
    trained_scales: int = 0
    balance: float = 0.0
    label_smoothing: float = 0.0
    correction: SelfCorrection = SelfCorrection()
    bit_loss: BitReduction = 'mean'
    released_loss_scale: bool = False
    unmasking: Unmasking = Unmasking()
    ema: float = 0.0
    dtype: Dtype = 'float32'
    gradient_dtype: Dtype = 'float32'
    remat: Remat = 'none'
    unroll: int = 1
    attention: Name = 'automatic'
    sampling: Settings = Settings()
    mesh: MeshShape = MeshShape()
    seed: int = 0

    @property
    def mean_batch(self) -> float:
        """Images per step: all steps have the same number."""
        return self.optimizer.accumulate * self.batch

    def __post_init__(self) -> None:
        _check_common(self)
        if self.model.schedule.steps < 2:
            raise UserError(
                f'the model has {self.model.schedule.steps} scale, and training predicts scales '
                'from earlier scales: give two or more'
            )
        if not 0 <= self.caption_drop <= 1:
            raise UserError(f'caption_drop is a probability, not {self.caption_drop}')
        if not 0 <= self.trained_scales <= self.model.schedule.steps:
            raise UserError(
                f'trained_scales must lie in [0, {self.model.schedule.steps}] (0: all scales), '
                f'not {self.trained_scales}'
            )
        if self.trained_scales:
            self.model.schedule.leading_rows(self.trained_scales)
            if self.model.keep_tokens or self.model.refinement:
                raise UserError(
                    'trained_scales leaves scales out of the loss, and so do model.keep_tokens and '
                    'a refinement head: set only one of them'
                )
        if not 0 <= self.balance <= 1:
            raise UserError(f'balance must lie in [0, 1], not {self.balance}')
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f'label_smoothing must lie in [0, 1), not {self.label_smoothing}')
        if self.cache:
            self.crops.check_cacheable()
        if not 1 <= self.unroll <= MOST_LAYERS:
            raise UserError(
                f'unroll is a number of layers in [1, {MOST_LAYERS}], not {self.unroll}'
            )


COMMANDS = {Run: 'train', TokenizerRun: 'train-tokenizer'}


def run_class(fields: object, where: str) -> type[Run | TokenizerRun]:
    """The class of a run's JSON fields: only a tokenizer's run has an objective.

    Raises UserError for the config of a model folder.
    """
    if isinstance(fields, dict) and 'family' in fields:
        raise UserError(
            f'{where} belongs to a model folder, expected the config of a run: '
            '`train CONFIG --init FOLDER` starts from a model'
        )
    return TokenizerRun if isinstance(fields, dict) and 'objective' in fields else Run


def check_kind(fields: object, kind: type, where: str) -> None:
    """Raises UserError unless the JSON fields of a run are those of the class `kind`."""
    found = run_class(fields, where)
    if found is not kind:
        raise UserError(
            f'{where} is the config of a {found.__name__}, expected that of a {kind.__name__}: '
            f'it is for star-jax {COMMANDS[found]}'
        )


def resolve(run: Run | TokenizerRun) -> Run | TokenizerRun:
    """The run with defaults that depend on other fields.

    A validation set without a path is a split of the training set. A transformer without a
    tokenizer uses the one of `init`, or the shipped one.

    Raises UserError for a validation set without a path that differs from the training set in more
    than its split.
    """
    changes: dict[str, Any] = {}
    if not isinstance(run.validation, Shapes) and not run.validation.path:
        _check_same_set(run.data, run.validation)
        changes['validation'] = dataclasses.replace(run.data, split=run.validation.split)
    if isinstance(run, Run) and not run.tokenizer:
        changes['tokenizer'] = run.init or SHIPPED
    return dataclasses.replace(run, **changes)


def _check_same_set(data: Data, validation: Prepared | Folder) -> None:
    """Raises UserError unless a validation set without a path can be a split of the training set.

    Its fields must be left out or equal those of the training set.
    """
    if type(validation) is not type(data):
        kind = type(data).__name__
        raise UserError(
            f'validation is a {type(validation).__name__} without a path, which means a split of '
            f'the training set, but data is a {kind}: make validation a {kind}, too, or give it a '
            'path'
        )
    for field in dataclasses.fields(validation):
        given, expected = getattr(validation, field.name), getattr(data, field.name)
        if field.name not in ('path', 'split') and given not in (expected, field.default):
            raise UserError(
                f'validation.{field.name} is {given!r}, but without a path validation is a split '
                f'of the training set, whose {field.name} is {expected!r}: leave '
                f'validation.{field.name} out, or give validation.path, too'
            )


def _check_common(run: Run | TokenizerRun) -> None:
    check_types(run)
    if run.batch < 1:
        raise UserError(f'batch must be at least 1, not {run.batch}')
    if run.pace.steps * run.optimizer.accumulate > MAX_STEPS:
        raise UserError(
            f'steps x optimizer.accumulate must be at most {MAX_STEPS} micro-batches, not '
            f'{run.pace.steps * run.optimizer.accumulate}'
        )
    if not 0 <= run.ema < 1:
        raise UserError(f'ema is a decay in [0, 1), not {run.ema}')
    if not 0 <= run.seed < 2**32:
        raise UserError(f'seed must lie in [0, 2^32), not {run.seed}')
    if isinstance(run.data, Folder) and run.data.split == TEST:
        raise UserError(
            f'data.split is {TEST!r}, whose images are never trained on: choose train or all'
        )
