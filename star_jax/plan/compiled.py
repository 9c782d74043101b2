"""What does a compiler say of a program for machines that are not here?"""

import dataclasses
import re
import time

import jax

from star_jax.errors import UserError
from star_jax.plan import hlo
from star_jax.plan.workload import Piece

UNITS = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}
NEEDED = re.compile(r'HLO temporaries \(([\d.]+)([KMGT]?)\)|Used ([\d.]+)([KMGT]?) of')


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Bytes of one device, as its compiler laid them out.

    `temporaries` beside `arguments`, results that take no argument's place included. `text` is that
    of the program, None where it does not fit and was not finished.
    """

    arguments: int
    temporaries: int
    text: hlo.Text | None
    seconds: float


def build(piece: Piece, arguments: int, devices: int, slices: int) -> Compiled:
    """Compiles a program for the devices that its arguments lie on, of `arguments` bytes each.

    Raises UserError for what the compiler refuses, except for too little memory.
    """
    begun = time.monotonic()
    try:
        program = piece.function.lower(*piece.args).compile()
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        found = NEEDED.search(str(error))
        if found is None:
            reason = str(error).partition('\n')[0]
            raise UserError(f'the compiler refuses the program: {reason}') from error
        temporaries, unit, used, other = found.groups()
        size = float(temporaries or used) * UNITS[unit or other or '']
        size -= arguments if used else 0
        return Compiled(arguments, int(size), None, time.monotonic() - begun)
    memory = program.memory_analysis()
    more = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Compiled(
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes + more + memory.generated_code_size_in_bytes,
        text=hlo.Text(program.as_text(), devices, slices),
        seconds=time.monotonic() - begun,
    )
