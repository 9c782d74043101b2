"""From which folders is a pipeline loaded?"""

import dataclasses
import os
from pathlib import Path

from jax.sharding import Mesh

from star_jax.checkpoint import folder, models
from star_jax.core.argument_types import choice, flag, instance
from star_jax.core.buckets import Buckets
from star_jax.core.settings import Dtype
from star_jax.errors import UserError
from star_jax.protocols import CrossAttentionMode, PromptEncoder
from star_jax.sampling.image_size import MODELS_OWN, ImageSize
from star_jax.sampling.image_size import choose as choose_size
from star_jax.sampling.pipeline import Pipeline
from star_jax.text.encoder import load as load_text


def load(
    source: str | Path,
    text: str | Path = '',
    dtype: str = 'float32',
    mesh: Mesh | None = None,
    cross_attention: CrossAttentionMode = 'as_trained',
    buckets: Buckets | None = None,
    check: bool = True,
    size: ImageSize = MODELS_OWN,
    text_dtype: str = 'float32',
) -> Pipeline:
    """Loads a pipeline.

    Args:
        source: a model folder, a hub id, 'shipped' or 'shipped/infinity'.
        text: a path or hub id of the model's text encoder; by default the one that the model names.
        dtype: dtype of activations.
        mesh: the devices, over which parameters are sharded as in training and batches are split;
            by default the first device alone.
        cross_attention: as the model was trained; 'corrected'; or 'released', where the unprompted
            row of an image attends to the text of its prompted row.
        buckets: the first and the last of scales that share a part of the program (by default
            those that suit the platform): equal images, faster to compile, slower to run.
        check: compare the weights with the SHA-256 that the model folder keeps.
        size: the size of the images, for a model with templates of several aspect ratios; the
            nearest one is sampled (by default the model's own), and may be resized.
        text_dtype: dtype of weights and activations of the text encoder.

    Raises:
        UserError: a folder that cannot be read, weights that changed since it was written, a text
            encoder that the model was not trained with, or another invalid argument (a
            UserTypeError if it has the wrong type).
    """
    instance('source', source, str | os.PathLike, 'a path, a hub id or a shipped model')
    instance('text', text, str | os.PathLike, "a path or a hub id ('': the one of the model)")
    choice('dtype', dtype, Dtype)
    choice('text_dtype', text_dtype, Dtype)
    choice('cross_attention', cross_attention, CrossAttentionMode)
    instance('mesh', mesh, Mesh | None, 'a jax.sharding.Mesh, such as MeshShape(fsdp=4).build()')
    flag('check', check)
    instance('size', size, ImageSize, "an ImageSize, such as ImageSize(aspect='16:9')")
    with models.reading(source, check) as model:  # checked while it is put on the devices
        model = with_cross_attention(model, cross_attention)
        options = {'dtype': dtype, 'mesh': mesh, 'buckets': buckets, 'size': size}
        return prepare(model, str(source), text=str(text), text_dtype=text_dtype, **options)


def prepare(
    model: folder.StoredModel,
    source: str,
    *,
    text: str = '',
    dtype: str = 'float32',
    mesh: Mesh | None = None,
    buckets: Buckets | None = None,
    size: ImageSize = MODELS_OWN,
    text_dtype: str = 'float32',
) -> Pipeline:
    """A pipeline of a model that was read from `source`; other arguments as for `load`.

    Raises:
        UserError: as for `load`, except for what reading raises.
    """

    def load_encoder(most: int | None = None) -> PromptEncoder:
        own = model.text.source if model.text else ''
        sha256 = model.text.sha256 if model.text else None
        if not (text or own):
            raise UserError(
                f'{source}: the model names no text encoder, and it samples from prompts: name the '
                'one that it was trained with (--text FOLDER)'
            )
        return load_text(text or own, sha256=sha256, most=most, dtype=text_dtype, mesh=mesh)

    model, template = choose_size(model, size)
    encoder = model.config.prompt_encoder(load_encoder)
    options = {'dtype': dtype, 'mesh': mesh, 'buckets': buckets, 'resize': size.resize}
    return Pipeline(model, encoder, template=template, **options)


def with_cross_attention(model: folder.StoredModel, mode: CrossAttentionMode) -> folder.StoredModel:
    """The model with another cross-attention; a UserError for a family without the choice."""
    return dataclasses.replace(model, config=model.config.with_cross_attention(mode))
