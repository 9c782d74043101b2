"""What is a training run?

A config file is one expression of these dataclasses, named `run`; the run's folder holds it as
`config.json`. Fields are plain data; `main` in `train.py` turns them into parts.
"""

import dataclasses
from typing import Literal

from star_jax.data.prepared import Prepared
from star_jax.data.shapes import Shapes
from star_jax.families.star import Star
from star_jax.parallel.mesh import MeshShape
from star_jax.text import DEFAULT
from star_jax.tokenizers.objective import Objective
from star_jax.tokenizers.residual_vq import VQ
from star_jax.training.optimizer import AdamW

Data = Shapes | Prepared


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pace:
    """How long a run is and how often it reports, in steps.

    Every `log` steps scalars, every `sample` pictures and held-out scores, every `save` a
    checkpoint, of which the newest `keep` stay.
    """

    steps: int = 10_000
    log: int = 50
    sample: int = 1_000
    save: int = 500
    keep: int = 2

    def __post_init__(self) -> None:
        if min(self.steps, self.log, self.sample, self.save, self.keep) < 1:
            raise ValueError(f'every number of a pace must be at least 1: {self}')


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerRun:
    """Trains a tokenizer.

    Training starts without the quantiser for `plain_steps`; then its codes start as k-means centres
    of what the encoder gives. Codes unused for `restart_every` steps move to vectors that are asked
    for, until `restart_until` of the run. `init` is a model folder to go on from ('': none; its
    codes are kept, so set `plain_steps` to 0).
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """Trains a transformer on the codes of a frozen tokenizer.

    `tokenizer` is a model folder ('shipped': the one in the package), `text` a text encoder. Text
    features come from a cache on disk, or are computed `inside` the training program. `init` is a
    model folder to go on from ('': none). A caption is replaced by the empty one with probability `caption_drop`. `ema` is the decay of the averaged
    parameters (0: none are kept). Activations are of `dtype`.
    """

    model: Star = Star()
    init: str = ''
    tokenizer: str = 'shipped'
    text: str = DEFAULT
    features: Literal['cached', 'inside'] = 'cached'
    data: Data = Shapes()
    validation: Data = Shapes(split='validation', count=512)
    optimizer: AdamW = AdamW()
    pace: Pace = Pace()
    batch: int = 64
    caption_drop: float = 0.1
    ema: float = 0.0
    dtype: Literal['float32', 'bfloat16'] = 'float32'
    remat: bool = False
    guidance: float = 4.0
    top_k: int = 600
    top_p: float = 0.8
    mesh: MeshShape = MeshShape()
    seed: int = 0

    def __post_init__(self) -> None:
        _check_common(self)
        if not 0 <= self.caption_drop <= 1:
            raise ValueError(f'caption_drop is a probability, not {self.caption_drop}')


def _check_common(run: Run | TokenizerRun) -> None:
    if run.batch < 1:
        raise ValueError(f'batch must be at least 1, not {run.batch}')
    if not 0 <= run.ema < 1:
        raise ValueError(f'ema is a decay in [0, 1), not {run.ema}')
