"""Does this code compute the arrays that the original code recorded?

`verify` checks one case folder; `main` checks several for the command line. Matmuls run at full
float32 precision on every platform.
"""

import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path

import einops
import flax.errors
import jax

from star_jax.console import Console
from star_jax.errors import UserError
from star_jax.verify import comparison, infinity_options, llamagen_options, rules, star_options
from star_jax.verify.cases import Case, read_case
from star_jax.verify.comparison import CaseReport
from star_jax.verify.function_cases import Rope, Sampling, Schedules
from star_jax.verify.generate import Generations
from star_jax.verify.infinity import BitFilters, RotaryTables
from star_jax.verify.infinity_generate import BitGenerations
from star_jax.verify.infinity_tokenizer import BitQuantisers, BitTokenizer, SelfCorrections
from star_jax.verify.infinity_train import BitTraining
from star_jax.verify.infinity_transformer import TeacherForcedBits
from star_jax.verify.llamagen import Postprocessing, RasterFilters, RasterTables
from star_jax.verify.llamagen_generate import ClassGenerations, TextGenerations
from star_jax.verify.llamagen_objective import AdversarialLosses
from star_jax.verify.llamagen_tokenizer import VqTokenizer
from star_jax.verify.llamagen_transformer import TeacherForcedClasses, TeacherForcedTexts
from star_jax.verify.sampler import Refinements
from star_jax.verify.star import TeacherForced
from star_jax.verify.tokenizer import Quantiser, Vqvae
from star_jax.verify.train import Training
from star_jax.verify.var import ClassConditional

KINDS = {
    ('star', 'rope'): Rope,
    ('star', 'vqvae'): Vqvae,
    ('star', 'quantizer'): Quantiser,
    ('star', 'star'): TeacherForced,
    ('star', 'star_generate'): Generations,
    ('star', 'star_sampler'): Refinements,
    ('star', 'star_train'): Training,
    ('star', 'var'): ClassConditional,
    ('star', 'sampling'): Sampling,
    ('star', 'schedule'): Schedules,
    ('infinity', 'rope2d'): RotaryTables,
    ('infinity', 'sampling'): BitFilters,
    ('infinity', 'quantizer'): BitQuantisers,
    ('infinity', 'tokenizer'): BitTokenizer,
    ('infinity', 'self_correction'): SelfCorrections,
    ('infinity', 'transformer'): TeacherForcedBits,
    ('infinity', 'train_step'): BitTraining,
    ('infinity', 'generate'): BitGenerations,
    ('llamagen', 'rope2d'): RasterTables,
    ('llamagen', 'sampling'): RasterFilters,
    ('llamagen', 'vq'): VqTokenizer,
    ('llamagen', 'vqloss'): AdversarialLosses,
    ('llamagen', 'postprocess'): Postprocessing,
    ('llamagen', 'c2i_teacher_forced'): TeacherForcedClasses,
    ('llamagen', 't2i_teacher_forced'): TeacherForcedTexts,
    ('llamagen', 'c2i_generate'): ClassGenerations,
    ('llamagen', 't2i_generate'): TextGenerations,
}
OPTIONS = {
    'star': star_options.OPTIONS,
    'infinity': infinity_options.OPTIONS,
    'llamagen': llamagen_options.OPTIONS,
}
# The tolerances of families whose cases have none.
MARKS = {'infinity': infinity_options.MARKS, 'llamagen': llamagen_options.MARKS}


def verify(folder: Path) -> CaseReport:
    """Compares every array that the case in `folder` records.

    Raises:
        UserError: the folder is not a case, its family or kind is unknown, or its config has an
            option that is unknown or not implemented.
    """
    case = read_case(folder)
    kind = (case.option('family'), case.option('kind'))
    if kind not in KINDS:
        raise UserError(
            f'{folder}: family {kind[0]!r} with kind {kind[1]!r} is unknown, expected one of '
            f'{", ".join(map(" ".join, KINDS))}'
        )
    OPTIONS[kind[0]][kind[1]].check(case.config, case.path)
    case = dataclasses.replace(case, marks=MARKS.get(kind[0]))
    with jax.default_matmul_precision('highest'):
        return CaseReport(os.path.basename(os.path.realpath(folder)), _lines(case, KINDS[kind]))


def main(folders: Sequence[Path]) -> int:
    """Verifies cases and prints their reports.

    Returns:
        The exit status: 1 if an array fails or no rule computes it, else 0.

    Raises:
        UserError: some folders could not be verified; the others were.
    """
    if not folders:
        raise UserError('verify needs the folder of at least one recorded case')
    console = Console()
    failed, refusals = False, []
    for folder in folders:
        start = time.monotonic()
        try:
            report = verify(folder)
        except UserError as error:
            refusals.append(str(error))
            continue
        comparison.write(report, time.monotonic() - start, console)
        failed |= report.failed
    if refusals:
        raise UserError('; '.join(refusals))
    return int(failed)


def _lines(case: Case, kind: type) -> tuple[comparison.Line, ...]:
    try:
        return rules.compare_case(case, kind(case).rules())
    except (flax.errors.FlaxError, einops.EinopsError) as error:
        raise UserError(f'{case.folder}: the weights do not fit the config: {error}') from error
    except UserError as error:
        if str(case.folder) in str(error):
            raise
        raise UserError(f'{case.path} describes no case of its kind: {error}') from error
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f'{case.path} does not describe a case of its kind '
            f'({type(error).__name__}: {error}): record it again'
        ) from error
