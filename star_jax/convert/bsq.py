"""Which parameter does each published tensor of an Infinity tokenizer become?

Infinity specification 9. The projections and the norm around the quantiser are in no published
file.
"""

import re
from collections.abc import Iterable

from star_jax.checkpoint.weights import flatten
from star_jax.convert.entries import Entry
from star_jax.convert.star import LINEAR, SAME, module_name
from star_jax.tokenizers.residual_bsq import BSQ

QUANTISER = 'quantizer.'  # prefix of the quantiser's tensors
IGNORED = ('lfq.mask',)  # powers of two, registered twice

PROJECTIONS = (
    ('project_in.weight', 'quantiser/project_in/kernel', LINEAR),
    ('project_in.bias', 'quantiser/project_in/bias', SAME),
    ('project_out.weight', 'quantiser/project_out/kernel', LINEAR),
    ('project_out.bias', 'quantiser/project_out/bias', SAME),
)
NORM = (
    ('layernorm.weight', 'quantiser/norm/scale', SAME),
    ('layernorm.bias', 'quantiser/norm/bias', SAME),
)


def quantiser_entries(bsq: BSQ, prefix: str = QUANTISER) -> list[Entry]:
    """The table of the quantiser alone, empty for published tokenizers."""
    rules = PROJECTIONS if bsq.projected else ()
    rules += NORM if bsq.normalised else ()
    return [Entry(f'{prefix}{torch}', name, pattern) for torch, name, pattern in rules]


def bsq_entries(bsq: BSQ, names: Iterable[str] = ()) -> list[Entry]:
    """The table of a tokenizer.

    Args:
        bsq: its config.
        names: tensor names of a file, from which it follows whether the modules are wrapped
            (`conv_in.conv.weight`), as in published files; if empty, they are.
    """
    names = set(names)
    wrapped = not names or 'encoder.conv_in.conv.weight' in names
    entries = quantiser_entries(bsq)
    for name, leaf in flatten(bsq.abstract()).items():
        if not name.startswith('quantiser/'):
            pattern = 'o i h w -> h w i o' if leaf.ndim == 4 else SAME
            torch = module_name(name)
            entries.append(Entry(_wrapped(torch) if wrapped else torch, name, pattern))
    return entries


def _wrapped(torch: str) -> str:
    """encoder.norm_out.weight -> encoder.norm_out.norm.weight"""
    module, _, parameter = torch.rpartition('.')
    kind = 'norm' if re.search(r'\.norm(\d|_out)$', module) else 'conv'
    return f'{module}.{kind}.{parameter}'
