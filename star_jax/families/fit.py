"""Do a tokenizer, a text encoder and templates fit a transformer?"""

from star_jax.core.codes import Bits, Codes, Index
from star_jax.errors import UserError
from star_jax.protocols import Family, PromptEncoder, TokenizerConfig


def check_tokenizer(model: Family, tokenizer: TokenizerConfig, *, where: str, remedy: str) -> None:
    """Checks that a transformer and a tokenizer agree on codes and channels.

    Args:
        model: config of the transformer.
        tokenizer: config of the tokenizer.
        where: the file or option that names the tokenizer, for the message.
        remedy: the advice of the message.

    Raises:
        UserError: names the field that differs, and both values.
    """
    ours, theirs = model.vocabulary, tokenizer.vocabulary
    if isinstance(ours, Bits) and isinstance(theirs, Bits):
        if ours != theirs:
            raise UserError(
                f'{where}: model.bits is {ours.width}, but a token of the tokenizer has '
                f'{theirs.width} bits: {remedy}'
            )
        return
    fields = {
        'codes': (_show(ours), _show(theirs)),
        'channels': (model.vector_width, tokenizer.vector_width),
    }
    for name, (predicted, produced) in fields.items():
        if predicted != produced:
            raise UserError(
                f'{where}: model.{name} is {predicted}, but tokenizer.{name} is {produced}: '
                f'{remedy}'
            )


def check_text_encoder(encoder: PromptEncoder, width: int) -> PromptEncoder:
    """The text encoder; UserError unless its features have the model's text width."""
    if encoder.width != width:
        raise UserError(
            f'model.text_width is {width}, but the text encoder {encoder.source} has '
            f'{encoder.width}: set it so, or give the model its own encoder'
        )
    return encoder


def templates_flaw(model: Family) -> str:
    """Why a model cannot have images of its templates; '' if it can."""
    own, templates = model.schedule, model.templates
    if not templates:
        return ''
    try:
        template = templates.schedule(templates.of_grids(own.grids), own.steps)
    except UserError as error:
        return str(error)
    reference = model.at(template).schedule.reference_grid
    if own.reference_grid == reference:
        return ''
    return (
        f'model.reference is {own.reference_grid}, but the template of the grids of the model ends '
        f'with {reference}'
    )


def _show(codes: Codes) -> int | str:
    return codes.size if isinstance(codes, Index) else f'{codes.num_logits // 2} bits'
