"""How many images that a model samples show what their prompts state?"""

import dataclasses
import itertools
import statistics
from collections.abc import Sequence

from star_jax.checkpoint import folder
from star_jax.core.settings import Settings
from star_jax.data.shapes import Shapes
from star_jax.evaluation import alignment
from star_jax.sampling import loading
from star_jax.sampling.pipeline import Pipeline

OBJECTS = (1, 2)  # in the scenes whose alignment is scored
BATCH = 50  # images per run of a program


@dataclasses.dataclass(frozen=True, kw_only=True)
class Aligned:
    """How many sampled images show what their prompts state; shares of the images.

    Attributes:
        objects: objects that a prompt states.
        count: images.
        all: everything stated holds, and nothing else is shown.
        number: the image shows the stated number of objects.
        colours: the stated colours.
        shapes: the stated shapes.
    """

    objects: int
    count: int
    all: float
    number: float
    colours: float
    shapes: float


def right(aligned: Sequence[Aligned]) -> float:
    """Share of all these images that show what their prompts state."""
    return sum(one.all * one.count for one in aligned) / sum(one.count for one in aligned)


def best_settings(
    model: folder.StoredModel, source: str, choices: Sequence[Settings], count: int
) -> Settings:
    """The settings with the most right images of training scenes, the first of equally good ones.

    Args:
        model: the model.
        source: its name, for errors.
        choices: the settings to choose from.
        count: images for each number of objects and each of the settings.
    """
    pipe = loading.prepare(model, source)
    shares = [right(_alignment(pipe, one, count, 'train')) for one in choices]
    return choices[shares.index(max(shares))]


def sampled_alignment(model: folder.StoredModel, source: str, count: int) -> list[Aligned]:
    """Alignment of the images that a model samples from the prompts of validation scenes.

    Args:
        model: the model; its recommended settings are used.
        source: the name of the model, for errors.
        count: images for each number of objects; image i uses seed i and prompt i.
    """
    return _alignment(loading.prepare(model, source), model.sampling, count, 'validation')


def _alignment(pipe: Pipeline, settings: Settings, count: int, split: str) -> list[Aligned]:
    """Alignment of the images that a model samples from the prompts of scenes of a split.

    Args:
        pipe: samples with the model.
        settings: the sampling settings.
        count: images for each number of objects; image i uses seed i and prompt i.
        split: the split of the scenes.
    """
    result = []
    for objects in OBJECTS:
        scenes = Shapes(count=count, split=split, objects=(objects,), phrasings=1)
        opened = scenes.open(pipe.tokenizer.resolution)
        prompts = [opened.captions(index)[0] for index in range(count)]
        images = pipe.stream(prompts, range(count), settings, batch=min(BATCH, count))
        checks = [
            alignment.check(image, prompt)
            for image, prompt in zip(itertools.chain.from_iterable(images), prompts, strict=True)
        ]

        def share(name: str, checks: Sequence[alignment.Alignment] = checks) -> float:
            return statistics.fmean(bool(getattr(check, name)) for check in checks)

        result.append(
            Aligned(
                objects=objects,
                count=count,
                all=share('all'),
                number=share('count'),
                colours=share('colours'),
                shapes=share('shapes'),
            )
        )
    return result
