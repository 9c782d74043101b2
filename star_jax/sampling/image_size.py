"""At which size does a model sample, where it has templates of several aspect ratios?"""

import dataclasses
import math

from star_jax.checkpoint.folder import StoredModel
from star_jax.core.argument_types import instance, whole_number
from star_jax.errors import UserError
from star_jax.families.fit import templates_flaw
from star_jax.image_io import parse_aspect
from star_jax.tokenizers.autoencoder import LARGEST_SIDE


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageSize:
    """A size of images; the nearest one that the model has is sampled, and may be resized.

    Attributes:
        aspect: width:height of the images, such as 16:9, which is wide ('': that of the model).
        height: height of the images in pixels, with width instead of aspect (0: not given).
        width: width of the images in pixels (0: not given).
        resolution: name of a resolution of the model, such as 0.25M ('': the nearest to height and
            width, or the one that the model was trained at).
        resize: side to which square images are resized before they are rounded, in pixels;
            LlamaGen's scores are of 384 px images resized to 256 (0: as sampled).
    """

    aspect: str = ''
    height: int = 0
    width: int = 0
    resolution: str = ''
    resize: int = 0

    def __post_init__(self) -> None:
        instance('aspect', self.aspect, str, 'a text such as 16:9')
        instance('resolution', self.resolution, str, 'a text such as 0.25M')
        whole_number('height', self.height)
        whole_number('width', self.width)
        if not 0 <= whole_number('resize', self.resize) <= LARGEST_SIDE:
            raise UserError(
                f'resize must lie in [0, {LARGEST_SIDE}] px (0: as sampled), not {self.resize}'
            )
        if self.aspect:
            parse_aspect(self.aspect)
        if min(self.height, self.width) < 0 or (self.height == 0) != (self.width == 0):
            raise UserError(
                f'height and width are given together, in pixels, not {self.height} and '
                f'{self.width}'
            )
        if self.aspect and self.height:
            raise UserError(
                'the ratio follows from height and width: leave out aspect, or height and width'
            )

    @property
    def ratio(self) -> float | None:
        """Height divided by width, None if neither is given."""
        if self.aspect:
            return 1 / parse_aspect(self.aspect)
        return self.height / self.width if self.height else None


MODELS_OWN = ImageSize()


def choose(model: StoredModel, size: ImageSize) -> tuple[StoredModel, str]:
    """The model at the grids nearest to a size, and the name of their template.

    The name is '' where no size is given.

    Raises:
        UserError: the model has no templates, its own grids are none of them, or a resolution of
            another model is named.
    """
    if dataclasses.replace(size, resize=0) == MODELS_OWN:
        return model, ''
    templates, own = model.config.templates, model.config.schedule
    flaw = templates_flaw(model.config)
    if flaw or not templates:
        height, width = _resolution(model)
        raise UserError(
            f'{flaw or "the model has no templates of other aspect ratios"}, and it samples '
            f'{height} x {width} px: leave aspect, height, width and resolution out'
        )
    name = templates.of_grids(own.grids) if size.ratio is None else templates.nearest(size.ratio)
    scales = own.steps
    if size.resolution:
        scales = templates.scales(size.resolution)
        if scales > own.steps:
            most = templates.resolution(own.steps) or f'{own.steps} scales'
            raise UserError(
                f'the resolution {size.resolution} has {scales} scales, but the model was trained '
                f'on {own.steps}: choose {most} or less'
            )
    elif size.height:
        counts = {count for _, count in templates.resolutions if count < own.steps} | {own.steps}
        area = size.height * size.width
        by_distance = {
            abs(math.log(math.prod(_resolution(_with(model, name, count))) / area)): count
            for count in sorted(counts, reverse=True)
        }
        scales = by_distance[min(by_distance)]
    return _with(model, name, scales), name


def _with(model: StoredModel, name: str, scales: int) -> StoredModel:
    """The model with the first scales of a template."""
    schedule = model.config.templates.schedule(name, scales)
    return dataclasses.replace(model, config=model.config.at(schedule))


def _resolution(model: StoredModel) -> tuple[int, int]:
    """(height, width) of its images in pixels."""
    return model.tokenizer.config.at(model.config.schedule).resolution
