"""How good are a tokenizer and a model?

Everything that `star-jax evaluate` says, as one tree of plain data: on images that training never
saw, what the tokenizer keeps of them, how well the model predicts them, and how well what it draws
from their captions agrees with those.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from star_jax import image_io
from star_jax.core.settings import Settings
from star_jax.errors import UserError
from star_jax.evaluation import (
    alignment,
    bootstrap,
    efficientnet,
    kid,
    prediction,
    reconstruction,
    scene_parser,
)
from star_jax.evaluation.alignment import Alignment
from star_jax.evaluation.bootstrap import Score
from star_jax.evaluation.efficientnet import EfficientNet
from star_jax.evaluation.eval_context import Subject
from star_jax.evaluation.groups import SHAPES
from star_jax.evaluation.reconstruction import Reconstructed
from star_jax.nn.perceptual import LEAST_SIDE, Lpips
from star_jax.parallel import machine
from star_jax.tokenizers import perceptual

TOKENIZER, LPIPS, LOSS, ALIGNMENT, KID = 'tokenizer', 'lpips', 'loss', 'alignment', 'kid'
PARTS = (TOKENIZER, LPIPS, LOSS, ALIGNMENT, KID)
KID_NAME = 'KID-EffLite0'  # never FID, whose network is another
TRUE, RECONSTRUCTED, DRAWN = 'true', 'reconstructed', 'drawn'
TOGETHER = (1, 2)  # numbers of objects that are also scored as one
SHOWN = 16  # pictures of a grid

Rows = list[dict[str, Any]]
Network = Lpips | EfficientNet | None
# How pictures were made, and those of every group, uint8 [N, H, W, 3].
Made = tuple[dict[str, Any], list[np.ndarray]]


def run(subject: Subject) -> dict[str, Any]:
    """The report; a score of images is a `bootstrap.Score`, or None where nothing was asked.

    Raises UserError for parts that the job names and that cannot be scored on this subject. Those
    that it does not name are skipped, and the report says why.
    """
    networks, skipped = _prepare_parts(subject)
    job = subject.job
    report = {
        'model': job.place,
        'data': job.data,
        'resolution': list(subject.resolution),
        'count': job.count,
        'seed': job.seed,
        'dtype': job.dtype,
        'cross_attention': job.cross_attention,
        'environment': machine.describe(),
        'skipped': skipped,
    }
    kept = reconstruct(subject, networks.get(LPIPS)) if networks.keys() != {LOSS} else []
    if networks.keys() & {TOKENIZER, LPIPS}:
        report[TOKENIZER] = tokenizer_rows(subject, kept)
    if LOSS in networks:
        report[LOSS] = loss_rows(subject)
    judges: dict[str, Callable[[Made], Rows]] = {}
    if ALIGNMENT in networks:
        judges[ALIGNMENT] = functools.partial(alignment_rows, subject)
    if KID in networks:
        judges[KID] = Distances(subject, networks[KID]).rows
    report |= {part: [] for part in judges}
    for made in make(subject, kept) if judges else ():
        for part, judge in judges.items():
            report[part] += judge(made)
    return report


def reconstruct(subject: Subject, lpips: Lpips | None) -> list[Reconstructed]:
    """What the tokenizer keeps of each group's images."""
    keep = reconstruction.compile_tokenizer(subject.tokenizer, lpips, subject.job.batch)
    return [
        reconstruction.join(subject.shown(keep(group.source), group, 'reconstructing'))
        for group in subject.groups
    ]


def make(subject: Subject, kept: Sequence[Reconstructed]) -> Iterator[Made]:
    """True pictures, reconstructed ones, and those drawn with each of the job's settings."""
    yield {'pictures': TRUE, 'settings': None}, [group.images() for group in subject.groups]
    yield {'pictures': RECONSTRUCTED, 'settings': None}, [found.images for found in kept]
    for settings in subject.job.settings if subject.model else ():
        how = {'pictures': DRAWN, 'settings': dataclasses.asdict(settings)}
        yield how, [subject.draw(group, settings) for group in subject.groups]


def tokenizer_rows(subject: Subject, kept: Sequence[Reconstructed]) -> Rows:
    """PSNR, LPIPS and use of codes on each split."""
    grids, seed = subject.tokenizer.config.grids, subject.job.seed
    return [
        {'split': split, **reconstruction.scores(reconstruction.join(some), grids, seed)}
        for split, some in subject.by_split(kept).items()
    ]


def loss_rows(subject: Subject) -> Rows:
    """Loss and accuracy on each split."""
    job, schedule = subject.job, subject.pipe.network.schedule
    encoder = subject.pipe.encoder
    predict = prediction.compile_model(subject.model, encoder, job.dtype, job.batch)
    found = [
        prediction.join(subject.shown(predict(group.source), group, 'predicting'))
        for group in subject.groups
    ]
    return [
        {'split': split, **prediction.scores(prediction.join(some), schedule, job.seed)}
        for split, some in subject.by_split(found).items()
    ]


def alignment_rows(subject: Subject, made: Made) -> Rows:
    """Whether what captions say holds in their pictures, for each number of objects."""
    how, images = made
    found = [
        (group.objects, list(map(alignment.judge, some, group.captions)))
        for group, some in zip(subject.groups, images, strict=True)
    ]
    rows = []
    for split, parts in subject.by_split(found).items():
        verdicts = {(objects,): some for objects, some in parts}
        verdicts[TOGETHER] = [one for number in TOGETHER for one in verdicts[number,]]
        rows += [
            {'split': split, 'objects': list(objects), **how, **tally(some, subject.job.seed)}
            for objects, some in verdicts.items()
        ]
    return rows


def tally(verdicts: Sequence[Alignment], seed: int) -> dict[str, Score | None]:
    """The share of the pictures in which each attribute that their caption claims is so."""
    shares: dict[str, Score | None] = {}
    for field in dataclasses.fields(Alignment):
        said = [getattr(verdict, field.name) for verdict in verdicts]
        held = [one for one in said if one is not None]
        shares[field.name] = bootstrap.mean(np.array(held), seed) if held else None
    return shares


class Distances:
    """KID of pictures from the images of their groups."""

    def __init__(self, subject: Subject, network: EfficientNet) -> None:
        self._subject = subject
        self._network = jax.device_put(network)
        self._program = jax.jit(lambda network, images: network.features(images))
        self._true = [self.features(group.images()) for group in subject.groups]

    def features(self, images: np.ndarray) -> np.ndarray:
        """[N, 1280] of uint8 pictures [N, h, w, 3]."""
        batch = self._subject.job.batch
        blocks = []
        for first in range(0, len(images), batch):
            some = efficientnet.resize(images[first : first + batch])
            filled = np.resize(some, (batch, *some.shape[1:]))  # repeats them
            blocks.append(np.asarray(self._program(self._network, filled))[: len(some)])
        return np.concatenate(blocks)

    def rows(self, made: Made) -> Rows:
        """One for each split."""
        how, images = made
        if how['pictures'] == TRUE:
            return []
        groups, seed = self._subject.groups, self._subject.job.seed
        return [
            {'split': group.split, **how, KID_NAME: kid.score(true, self.features(some), seed)}
            for group, true, some in zip(groups, self._true, images, strict=True)
        ]


def grid(subject: Subject, settings: Settings) -> np.ndarray:
    """One picture of what is drawn from the first captions, equally many of each group.

    Of shapes the captions are those of one and of two objects in the first split. Image i is drawn
    from the key of seed + i, so nothing is chosen.
    """
    groups = subject.groups
    if subject.job.data == SHAPES:
        groups = [
            group
            for group in groups
            if group.split == groups[0].split and group.objects in TOGETHER
        ]
    share = max(SHOWN // len(groups), 1)
    captions = [caption for group in groups for caption in group.captions[:share]]
    images = subject.pipe(
        captions, subject.job.seed, min(subject.job.batch, SHOWN), **vars(settings)
    )
    return image_io.grid(images, captions, columns=8)


def _prepare_parts(subject: Subject) -> tuple[dict[str, Network], dict[str, str]]:
    """What can be scored, each with the network that it needs, and why other parts cannot."""
    ready, skipped = {}, {}
    for part in subject.job.parts or _suitable(subject):
        try:
            ready[part] = _prepare(part, subject)
        except UserError as error:
            if subject.job.parts:
                raise
            skipped[part] = str(error)
    return ready, skipped


def _suitable(subject: Subject) -> list[str]:
    """The parts that mean something for this subject on this set."""
    judged_by = ALIGNMENT if subject.job.data == SHAPES else KID
    return [TOKENIZER, LPIPS, *([LOSS] if subject.model else []), judged_by]


def _prepare(part: str, subject: Subject) -> Network:
    """The network of a part, if it needs one. Raises UserError where it cannot be scored."""
    size, place = min(subject.resolution), subject.job.place
    if part == LPIPS:
        if size < LEAST_SIDE:
            raise UserError(f'LPIPS needs images of at least {LEAST_SIDE} px, {place} has {size}')
        return perceptual.load()
    if part == KID:
        if min(len(group.source) for group in subject.groups) < 2:
            raise UserError('KID compares pictures in pairs: expected at least two in each split')
        return efficientnet.load()
    if part == LOSS and subject.model is None:
        raise UserError(f'{place} holds a tokenizer alone: a loss is that of a model, give one')
    if part == ALIGNMENT and subject.job.data != SHAPES:
        raise UserError(f'alignment is read from shapes, not {subject.job.data}: leave it out')
    if part == ALIGNMENT and size < scene_parser.SIDE:
        raise UserError(
            f'alignment is read from {scene_parser.SIDE} px or more, {place} has {size}'
        )
    return None
