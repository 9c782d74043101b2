"""Does an image tokenizer produce the codes that a transformer predicts?"""

from star_jax.core.codes import Codes, Index
from star_jax.errors import UserError
from star_jax.protocols import Family, TokenizerConfig


def check_tokenizer(model: Family, tokenizer: TokenizerConfig, *, where: str, remedy: str) -> None:
    """Checks that a transformer and a tokenizer agree on codes and channels.

    Args:
        model: config of the transformer.
        tokenizer: config of the tokenizer.
        where: the file or option that names the tokenizer, for the message.
        remedy: what the user can do about a difference.

    Raises:
        UserError: names the field that differs, and both values.
    """
    fields = {
        'codes': (_show(model.vocabulary), _show(tokenizer.vocabulary)),
        'channels': (model.vector_width, tokenizer.vector_width),
    }
    for name, (predicted, produced) in fields.items():
        if predicted != produced:
            raise UserError(
                f'{where}: model.{name} is {predicted}, but tokenizer.{name} is {produced}: '
                f'{remedy}'
            )


def _show(codes: Codes) -> int | Codes:
    return codes.size if isinstance(codes, Index) else codes
