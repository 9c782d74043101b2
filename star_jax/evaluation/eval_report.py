"""How good are a tokenizer and a model?

The report of `star-jax evaluate`, as one tree of plain data. All metrics use images that training
never saw: how well the tokenizer reconstructs them, how well the model predicts their codes, and
how well images sampled from their captions match those captions.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

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
from star_jax.evaluation.eval_context import EvalContext, EvalOptions
from star_jax.evaluation.groups import SHAPES_DATASET
from star_jax.evaluation.reconstruction import Reconstruction
from star_jax.nn.perceptual import MIN_SIDE, Lpips
from star_jax.parallel import machine
from star_jax.tokenizers import perceptual

TOKENIZER, LPIPS, LOSS, ALIGNMENT, KID = 'tokenizer', 'lpips', 'loss', 'alignment', 'kid'
METRICS = (TOKENIZER, LPIPS, LOSS, ALIGNMENT, KID)
KID_NAME = 'KID-EffLite0'  # never FID, which is defined on another network
TRUE, RECONSTRUCTED, SAMPLED = 'true', 'reconstructed', 'sampled'  # origins of images
POOLED_OBJECTS = (1, 2)  # numbers of objects that are also scored together
GRID_IMAGES = 16

Rows = list[dict[str, Any]]
Network = Lpips | EfficientNet | None


class ImageSet(NamedTuple):
    """Images of one origin, for every group.

    Attributes:
        origin: TRUE, RECONSTRUCTED or SAMPLED.
        settings: the sampling settings, or None for images that were not sampled.
        images: one array per group, uint8 [N, H, W, 3].
    """

    origin: str
    settings: dict[str, Any] | None
    images: list[np.ndarray]

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of a row that name the set."""
        return {'images': self.origin, 'settings': self.settings}


def run(context: EvalContext) -> dict[str, Any]:
    """The report; its scores are `bootstrap.Score`, or None where no caption makes the claim.

    Metrics that the options do not name are skipped if they cannot be computed, and the report
    records why.

    Raises:
        UserError: a metric that the options name cannot be computed.
    """
    networks, skipped = _load_networks(context)
    options = context.options
    report = {
        'model': options.model,
        'data': options.data,
        'resolution': list(context.resolution),
        'count': options.count,
        'seed': options.seed,
        'dtype': options.dtype,
        'cross_attention': options.cross_attention,
        'environment': machine.describe(),
        'skipped': skipped,
    }
    if options.text_dtype != EvalOptions.text_dtype:
        report['text_dtype'] = options.text_dtype
    needs_reconstructions = networks.keys() != {LOSS}
    reconstructions = reconstruct(context, networks.get(LPIPS)) if needs_reconstructions else []
    if networks.keys() & {TOKENIZER, LPIPS}:
        report[TOKENIZER] = tokenizer_rows(context, reconstructions)
    if LOSS in networks:
        report[LOSS] = loss_rows(context)
    image_metrics: dict[str, Callable[[ImageSet], Rows]] = {}
    if ALIGNMENT in networks:
        image_metrics[ALIGNMENT] = functools.partial(alignment_rows, context)
    if KID in networks:
        image_metrics[KID] = KidMetric(context, networks[KID]).rows
    report |= {metric: [] for metric in image_metrics}
    for image_set in image_sets(context, reconstructions) if image_metrics else ():
        for metric, rows in image_metrics.items():
            report[metric] += rows(image_set)
    return report


def reconstruct(context: EvalContext, lpips: Lpips | None) -> list[Reconstruction]:
    """The reconstructions of each group's images."""
    batch = context.options.batch
    reconstruct_source = reconstruction.compile_reconstruction(context.tokenizer, lpips, batch)
    return [
        reconstruction.concatenate(
            context.with_progress(reconstruct_source(group.source), group, 'reconstructing')
        )
        for group in context.groups
    ]


def image_sets(
    context: EvalContext, reconstructions: Sequence[Reconstruction]
) -> Iterator[ImageSet]:
    """The true images, their reconstructions, and images sampled with each of the settings."""
    yield ImageSet(TRUE, None, [group.images() for group in context.groups])
    yield ImageSet(RECONSTRUCTED, None, [result.images for result in reconstructions])
    for settings in context.options.settings if context.model else ():
        images = [context.sample(group, settings) for group in context.groups]
        yield ImageSet(SAMPLED, dataclasses.asdict(settings), images)


def tokenizer_rows(context: EvalContext, reconstructions: Sequence[Reconstruction]) -> Rows:
    """PSNR, LPIPS and used codes of each split."""
    config, seed = context.tokenizer.config, context.options.seed
    score = functools.partial(
        reconstruction.scores, grids=config.grids, codes=config.vocabulary, seed=seed
    )
    return [
        {'split': split, **score(reconstruction.concatenate(parts))}
        for split, parts in context.by_split(reconstructions).items()
    ]


def loss_rows(context: EvalContext) -> Rows:
    """Loss and accuracy of each split."""
    options, schedule = context.options, context.pipe.network.schedule
    predict = prediction.compile_prediction(
        context.model, context.pipe.encoder, dtype=options.dtype, batch=options.batch
    )
    predictions = [
        prediction.concatenate(context.with_progress(predict(group.source), group, 'predicting'))
        for group in context.groups
    ]
    return [
        {'split': split, **prediction.scores(prediction.concatenate(parts), schedule, options.seed)}
        for split, parts in context.by_split(predictions).items()
    ]


def alignment_rows(context: EvalContext, image_set: ImageSet) -> Rows:
    """The alignment of each split and number of objects, and of the pooled numbers."""
    results = [
        (group.objects, list(map(alignment.check, images, group.captions)))
        for group, images in zip(context.groups, image_set.images, strict=True)
    ]
    rows = []
    for split, parts in context.by_split(results).items():
        by_objects = {(objects,): alignments for objects, alignments in parts}
        by_objects[POOLED_OBJECTS] = [
            result for objects in POOLED_OBJECTS for result in by_objects[objects,]
        ]
        rows += [
            {
                'split': split,
                'objects': list(objects),
                **image_set.fields,
                **alignment_scores(alignments, context.options.seed),
            }
            for objects, alignments in by_objects.items()
        ]
    return rows


def alignment_scores(alignments: Sequence[Alignment], seed: int) -> dict[str, Score | None]:
    """The share of images in which an attribute holds, of the images whose caption claims it."""
    scores: dict[str, Score | None] = {}
    for field in dataclasses.fields(Alignment):
        results = [getattr(result, field.name) for result in alignments]
        claimed = [holds for holds in results if holds is not None]
        scores[field.name] = bootstrap.mean(np.array(claimed), seed) if claimed else None
    return scores


class KidMetric:
    """KID between the true images of each group and reconstructed or sampled ones."""

    def __init__(self, context: EvalContext, network: EfficientNet) -> None:
        self._context = context
        self._network = jax.device_put(network)
        self._program = jax.jit(lambda network, images: network.features(images))
        self._true = [self.features(group.images()) for group in context.groups]

    def features(self, images: np.ndarray) -> np.ndarray:
        """[N, 1280] of uint8 images [N, h, w, 3]."""
        batch = self._context.options.batch
        features = []
        for first in range(0, len(images), batch):
            resized = efficientnet.resize(images[first : first + batch])
            padded = np.resize(resized, (batch, *resized.shape[1:]))  # repeats images
            features.append(np.asarray(self._program(self._network, padded))[: len(resized)])
        return np.concatenate(features)

    def rows(self, image_set: ImageSet) -> Rows:
        """The distance of each split; none for the true images."""
        if image_set.origin == TRUE:
            return []
        seed = self._context.options.seed
        return [
            {
                'split': group.split,
                **image_set.fields,
                KID_NAME: kid.score(true, self.features(images), seed),
            }
            for group, true, images in zip(
                self._context.groups, self._true, image_set.images, strict=True
            )
        ]


def sample_grid(context: EvalContext, settings: Settings) -> np.ndarray:
    """A grid of images sampled from the first captions, equally many of each group.

    For shapes the captions are those of one and two objects in the first split. Image i uses the
    key of seed + i, so the images are not selected.

    Returns:
        uint8 [height, width, 3], with the captions below the images.
    """
    groups, options = context.groups, context.options
    if options.data == SHAPES_DATASET:
        groups = [
            group
            for group in groups
            if group.split == groups[0].split and group.objects in POOLED_OBJECTS
        ]
    share = max(GRID_IMAGES // len(groups), 1)
    captions = [caption for group in groups for caption in group.captions[:share]]
    batch = min(options.batch, GRID_IMAGES)
    images = context.pipe(captions, options.seed, batch, **vars(settings))
    return image_io.grid(images, captions, columns=8)


def _load_networks(context: EvalContext) -> tuple[dict[str, Network], dict[str, str]]:
    """The metrics that can be computed, with their networks, and why others cannot."""
    networks, skipped = {}, {}
    for metric in context.options.metrics or _default_metrics(context):
        try:
            networks[metric] = _load_network(metric, context)
        except UserError as error:
            if context.options.metrics:
                raise
            skipped[metric] = str(error)
    return networks, skipped


def _default_metrics(context: EvalContext) -> list[str]:
    """The metrics that apply to the model and the data."""
    image_metric = ALIGNMENT if context.options.data == SHAPES_DATASET else KID
    return [TOKENIZER, LPIPS, *([LOSS] if context.model else []), image_metric]


def _load_network(metric: str, context: EvalContext) -> Network:
    """The network of a metric, if it has one. Raises UserError if it cannot be computed."""
    size, options = min(context.resolution), context.options
    if metric == LPIPS:
        if size < MIN_SIDE:
            raise UserError(
                f'LPIPS needs images of at least {MIN_SIDE} px, {options.model} has {size}'
            )
        return perceptual.load()
    if metric == KID:
        if min(len(group.source) for group in context.groups) < 2:
            raise UserError('KID compares images in pairs: expected at least two in each split')
        return efficientnet.load()
    if metric == LOSS and context.model is None:
        raise UserError(f'{options.model} holds only a tokenizer: the loss needs a model')
    if metric == ALIGNMENT and options.data != SHAPES_DATASET:
        raise UserError(
            f'alignment is defined for shapes only, not for {options.data}: use --metrics kid'
        )
    if metric == ALIGNMENT and size < scene_parser.MIN_SIDE:
        raise UserError(
            f'alignment needs images of at least {scene_parser.MIN_SIDE} px, {options.model} has '
            f'{size}'
        )
    return None
