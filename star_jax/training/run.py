"""What is a training run?

A config file is one expression of these dataclasses, named `run`; the run's folder holds it as
`config.json`. Fields are plain data; `main` in `train.py` turns them into parts.
"""

import dataclasses
from typing import Any, Literal

from star_jax.checkpoint import models
from star_jax.core.settings import Dtype, Settings
from star_jax.data.folder import Folder
from star_jax.data.prepared import Prepared
from star_jax.data.shapes import Shapes
from star_jax.errors import UserError
from star_jax.families import Family, Star
from star_jax.nn.attention_dispatch import Name
from star_jax.parallel.mesh import MeshShape
from star_jax.text import DEFAULT
from star_jax.tokenizers.objective import Objective
from star_jax.tokenizers.residual_vq import VQ
from star_jax.training.optimizer import AdamW
from star_jax.training.refinement import Unmasking

MOST_STEPS = 2**31 - 1  # of anything that a program counts in int32

MOST_ENLARGED = 4  # times: beyond, a crop shows too little of a picture

Data = Shapes | Prepared | Folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pace:
    """How long a run is and how often it reports, all in steps.

    Attributes:
        steps: the whole run.
        log: from one report of scalars to the next.
        sample: from one grid of pictures, and held-out scores, to the next.
        save: from one checkpoint to the next.
        keep: the newest so many checkpoints stay.
    """

    steps: int = 10_000
    log: int = 50
    sample: int = 1_000
    save: int = 500
    keep: int = 2

    def __post_init__(self) -> None:
        if min(self.steps, self.log, self.sample, self.save, self.keep) < 1:
            raise ValueError(f'every number of a pace must be at least 1: {self}')
        if self.steps > MOST_STEPS:
            raise ValueError(f'steps must be at most {MOST_STEPS}, not {self.steps}')
        if self.save % self.log:
            raise ValueError(
                f'save ({self.save}) must be a multiple of log ({self.log}), so that a run that '
                'goes on from a checkpoint reports the same means'
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerRun:
    """Trains a tokenizer.

    Attributes:
        model: its sizes.
        data: the pictures.
        validation: the pictures of the held-out scores; without a path, those of data.
        init: a model folder to go on from ('': none); its codes stay if plain_steps is 0.
        objective: the weights of the losses.
        optimizer: the optimizer and its schedules.
        pace: length, reports and checkpoints.
        batch: images per step, on all devices.
        plain_steps: steps without the quantiser; then k-means finds the first codes.
        restart_every: steps after which unused codes move to vectors that are asked for.
        restart_until: share of the run after which they no longer do.
        ema: decay of the averaged parameters (0: none are kept).
        mesh: how the devices are arranged.
        seed: of the parameters and the order of the data.
    """

    model: VQ = VQ()
    data: Data = Shapes()
    validation: Data = Shapes(split='validation', count=512)
    init: str = ''
    objective: Objective = Objective()
    optimizer: AdamW = AdamW(weight_decay=0.0)
    pace: Pace = Pace()
    batch: int = 64
    plain_steps: int = 500
    restart_every: int = 50
    restart_until: float = 0.6
    ema: float = 0.0
    mesh: MeshShape = MeshShape()
    seed: int = 0

    def __post_init__(self) -> None:
        _check_common(self)
        if self.plain_steps < 0 or self.restart_every < 1:
            raise ValueError(
                'plain_steps must not be negative and restart_every at least 1 '
                f'(restart_until 0 restarts none), not {self.plain_steps} and {self.restart_every}'
            )
        if not 0 <= self.restart_until <= 1:
            raise ValueError(f'restart_until is a share in [0, 1], not {self.restart_until}')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """Trains a transformer on the codes of a frozen tokenizer.

    Of a model with a refinement head that head alone is trained, on the frozen model of `init`.

    Attributes:
        model: its sizes and parts.
        init: a model folder to go on from, perhaps of fewer scales ('': none).
        tokenizer: a model folder, a hub id, or 'shipped': the one in the package ('': that of
            init, or else the shipped one).
        text: the text encoder: package:NAME, a folder, or a hub id (a model of classes has none).
        features: text from a cache on disk, or computed inside the training program.
        cache: a folder of `star-jax data cache`, for codes and text features ('': pictures are
            encoded when they are needed, and features kept in the user's cache folder).
        data: captioned pictures.
        enlarge: training pictures are read so many times larger, and a random square of each is
            shown (VAR's 1.125); 1 shows all.
        validation: those of the held-out scores and of the sample grids; without a path, of data.
        optimizer: the optimizer and its schedules.
        pace: length, reports and checkpoints.
        batch: images per step, on all devices.
        caption_drop: probability of the empty caption, or of no class, instead of a picture's own.
        balance: 0 where every token counts alike in the loss, 1 where every scale does, however
            few its tokens; coarse scales decide what is where.
        released_loss_scale: where tokens are dropped (model.keep_tokens), the loss is multiplied by
            the images of a device, as in the published code; gradients are then clipped more.
        unmasking: how a refinement head is taught.
        ema: decay of the averaged parameters (0: none are kept).
        dtype: of the activations; bfloat16 for accelerators.
        remat: compute activations again in the backward pass, to save memory.
        unroll: layers compiled side by side; more is faster where layers are small (CPU), and
            takes longer to compile.
        attention: the kernel: what suits platform and shapes (automatic), the plain formula
            (dense), each scale over the keys it sees (by_scale), a part of the rows at a time
            (chunked), or a platform's own (flash: NVIDIA, in bfloat16; splash: TPU).
        sampling: how the sample grids are drawn.
        mesh: how the devices are arranged.
        seed: of the parameters and the order of the data.
    """

    model: Family = Star()
    init: str = ''
    tokenizer: str = ''
    text: str = DEFAULT
    features: Literal['cached', 'inside'] = 'cached'
    cache: str = ''
    data: Data = Shapes()
    enlarge: float = 1.0
    validation: Data = Shapes(split='validation', count=512)
    optimizer: AdamW = AdamW()
    pace: Pace = Pace()
    batch: int = 64
    caption_drop: float = 0.1
    balance: float = 0.0
    released_loss_scale: bool = False
    unmasking: Unmasking = Unmasking()
    ema: float = 0.0
    dtype: Dtype = 'float32'
    remat: bool = False
    unroll: int = 1
    attention: Name = 'automatic'
    sampling: Settings = Settings()
    mesh: MeshShape = MeshShape()
    seed: int = 0

    def __post_init__(self) -> None:
        _check_common(self)
        if len(self.model.sides) < 2:
            raise ValueError(
                f'model.sides {self.model.sides} is one scale, and training predicts scales from '
                'those before: give two or more'
            )
        if not 0 <= self.caption_drop <= 1:
            raise ValueError(f'caption_drop is a probability, not {self.caption_drop}')
        if not 0 <= self.balance <= 1:
            raise ValueError(f'balance must lie in [0, 1], not {self.balance}')
        if not 1 <= self.enlarge <= MOST_ENLARGED:
            raise ValueError(f'enlarge must lie in [1, {MOST_ENLARGED}], not {self.enlarge}')
        if self.enlarge > 1 and self.cache:
            raise ValueError(
                f'enlarge {self.enlarge} shows another part of a picture each time, and a cache '
                'holds the codes of one: leave out one of the two'
            )
        if self.unroll < 1:
            raise ValueError(f'unroll counts layers, at least 1, not {self.unroll}')


COMMANDS = {Run: 'train', TokenizerRun: 'train-tokenizer'}


def kind_of(fields: object, where: str) -> type[Run | TokenizerRun]:
    """Of which class the JSON fields of a run are: a tokenizer's are told by their objective.

    Raises UserError for those of a model folder, which look alike.
    """
    if isinstance(fields, dict) and 'family' in fields:
        raise UserError(
            f'{where} belongs to a model folder, expected the config of a run: '
            '`train CONFIG --init FOLDER` goes on from a model'
        )
    return TokenizerRun if isinstance(fields, dict) and 'objective' in fields else Run


def check_kind(fields: object, kind: type, where: str) -> None:
    """Raises UserError where the JSON fields of a run are not those of a `kind`."""
    given = kind_of(fields, where)
    if given is not kind:
        raise UserError(
            f'{where} is the config of a {given.__name__}, expected that of a {kind.__name__}: '
            f'it is for star-jax {COMMANDS[given]}'
        )


def resolve(run: Run | TokenizerRun) -> Run | TokenizerRun:
    """The run with all said.

    A validation set without a path is its split of what `data` names. A transformer whose tokenizer
    has no place goes on with that of `init`, or with the shipped one.
    """
    changes: dict[str, Any] = {}
    data, validation = run.data, run.validation
    if not isinstance(data, Shapes) and type(validation) is type(data) and not validation.path:
        changes['validation'] = dataclasses.replace(data, split=validation.split)
    if isinstance(run, Run) and not run.tokenizer:
        changes['tokenizer'] = run.init or models.SHIPPED
    return dataclasses.replace(run, **changes)


def _check_common(run: Run | TokenizerRun) -> None:
    if run.batch < 1:
        raise ValueError(f'batch must be at least 1, not {run.batch}')
    if not 0 <= run.ema < 1:
        raise ValueError(f'ema is a decay in [0, 1), not {run.ema}')
    if not 0 <= run.seed < 2**32:
        raise ValueError(f'seed must lie in [0, 2^32), not {run.seed}')
