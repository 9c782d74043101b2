"""Which options and steps do the commands share that take the config of a run?"""

import ast
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from star_jax.checkpoint import config
from star_jax.commands import arguments
from star_jax.commands.help_text import Sections
from star_jax.training.run import Run, TokenizerRun, check_kind

Runs = TypeVar('Runs', Run, TokenizerRun)

DATA = (
    'data.path',
    'data.split',
    'data.count',
)
SCHEDULE = (
    'pace.steps',
    'batch',
    'optimizer.learning-rate.peak',
    'optimizer.learning-rate.warmup-steps',
    'optimizer.weight-decay',
    'optimizer.clip',
    'optimizer.accumulate',
    'ema',
    'seed',
)
REPORTS = ('pace.log', 'pace.sample', 'pace.images', 'pace.save')
MESH = ('mesh.data', 'mesh.fsdp', 'mesh.tensor', 'mesh.sequence')

# The options of a run that --help describes.
COMMON: dict[type, Sections] = {
    Run: {
        'model': (
            'init',
            'tokenizer',
            'text',
            'model.depth',
            'model.width',
            'model.heads',
            'model.sides',
            'model.grids',
            'model.bits',
        ),
        'data': (*DATA, 'cache', 'text-features', 'caption-drop'),
        'training': SCHEDULE,
        'reports and checkpoints': REPORTS,
        'sample grids': ('sampling.guidance', 'sampling.top-k', 'sampling.top-p'),
        'devices and memory': (*MESH, 'dtype', 'remat', 'attention'),
    },
    TokenizerRun: {
        'model': (
            'init',
            'only',
            'model.grids',
            'model.grid',
            'model.codes',
            'model.channels',
            'model.bits',
            'model.autoencoder.width',
            'model.autoencoder.multipliers',
        ),
        'data': DATA,
        'losses': (
            'objective.l1',
            'objective.l2',
            'objective.edges',
            'objective.perceptual',
            'objective.scale-dropout',
            'objective.adversary.weight',
            'objective.adversary.start',
            'objective.adversary.adaptive',
        ),
        'training': (*SCHEDULE, 'plain-steps'),
        'reports and checkpoints': REPORTS,
        'devices': (*MESH, 'dtype'),
    },
}

# The options that decide which program is compiled, for commands that do not run it to the end.
PROGRAM: Sections = {
    'model': (
        'model.depth',
        'model.width',
        'model.heads',
        'model.sides',
        'model.grids',
        'model.keep-tokens',
    ),
    'program': ('batch', 'optimizer.accumulate', 'ema', 'dtype', 'remat', 'unroll', 'attention'),
    'sampling': ('sampling.guidance', 'sampling.top-k', 'sampling.stable.version'),
    'devices': MESH,
}


def train(words: Sequence[str], command: str, arguments_type: type, run_type: type) -> int:
    """`star-jax COMMAND [CONFIG] [--out DIR] [--field value ...]`.

    `arguments_type` is the dataclass of the arguments: a `run` of `run_type`, and `out`.
    """
    words = list(words)
    run, out, about = run_type(), Path('runs') / command, ''
    if words and not words[0].startswith('-'):
        path = Path(words.pop(0))
        run, about = load(path, run_type), introduction(path)
        out = Path('runs') / (path.stem if path.suffix == '.py' else path.parent.name)
    options = arguments.parse(
        arguments_type,
        words,
        f'{command} [CONFIG]',
        default=arguments_type(run=run, out=out),
        common=COMMON[run_type],
        about=about,
    )
    config.check(options.run, where='the settings of the run')
    from star_jax.training import train as program  # only after the arguments are checked

    program.main(options.run, options.out)
    return 0


def introduction(path: Path) -> str:
    """The docstring of a config file that was loaded, under its path; '' for config.json."""
    text = ast.get_docstring(ast.parse(path.read_bytes())) if path.suffix == '.py' else ''
    return f'{path}: {text}' if text else ''


def load(path: Path, run_type: type[Runs]) -> Runs:
    """The run in a config file.

    Raises:
        UserError: as `config.load_run`, or the config is one of another type.
    """
    if path.suffix == '.json':
        check_kind(config.read_json(path), run_type, str(path))
    return config.load_run(path, run_type)
