"""`star-jax COMMAND`: which module runs a command line, and how does it end?

Every command is a module of `star_jax/commands` with `main(words) -> exit status`. A user's mistake
ends with one sentence and exit status 2, a run that cannot continue with one and exit status 1.
"""

import difflib
import importlib
import importlib.metadata
import os
import platform
import signal
import sys
import types
from collections.abc import Callable, Sequence

from star_jax import __version__, files, terminal
from star_jax.errors import NO_MEMORY, RunError, UserError
from star_jax.parallel import malloc

# Purpose -> its commands, each with a summary and an example.
JOURNEYS: dict[str, dict[str, tuple[str, str]]] = {
    'Sample images': {
        'sample': (
            'generate images from prompts or classes',
            'star-jax sample "a red circle" "a small blue star" --out samples',
        ),
        'reconstruct': (
            'reconstruct images with a tokenizer, scale by scale',
            'star-jax reconstruct cat.png dog.jpg --out reconstructed',
        ),
    },
    'Train': {
        'train-tokenizer': (
            'train an image tokenizer',
            'star-jax train-tokenizer configs/shapes_tokenizer.py',
        ),
        'train': (
            'train a transformer on captioned images',
            'star-jax train configs/shapes.py --out runs/mine',
        ),
        'export': (
            'write a model folder from a checkpoint of a run',
            'star-jax export runs/mine --out models/mine',
        ),
        'study': (
            'run a study of many units, and report what it found',
            'star-jax study run configs/study/positions.py',
        ),
    },
    'Use your own images': {
        'data': (
            'prepare, show, encode or check a dataset',
            'star-jax data prepare folder my_images sets/own',
        ),
    },
    'Use published weights': {
        'convert': (
            'convert a published file to a model folder, or back',
            'star-jax convert star_d30_512.pth --tokenizer vae.pth --size 512 --out models/d30',
        ),
        'verify': (
            'compare recorded cases of the original code with this code',
            'star-jax verify tests/golden/star/*',
        ),
    },
    'Evaluate': {
        'evaluate': (
            'compute metrics of a model or a tokenizer on unseen images',
            'star-jax evaluate shipped --metrics alignment --guidance 1 2 4',
        ),
    },
    'Pods and benchmarks': {
        'plan': (
            'estimate memory, time and cost of a run on TPU pods or GPUs',
            'star-jax plan configs/star_d30_256.py --topology v5p-128',
        ),
        'bench': (
            'measure sampling, training, attention and data reading',
            'star-jax bench sample configs/star_d16_256.py --batch 4',
        ),
    },
}
COMMANDS = {name: text for commands in JOURNEYS.values() for name, text in commands.items()}
MODULES = {'train-tokenizer': 'train_tokenizer'}
RESUMABLE = ('train', 'train-tokenizer')  # stopping one is no failure: the same command continues
DEPENDENCIES = ('jax', 'flax')  # --version prints their versions
TERMINATED = {signal.SIGTERM: 143, signal.SIGHUP: 129}  # exit statuses, as in shells
INTERRUPTED = 130  # exit status after ctrl-c, as in shells
ROOM = 'make room, and give the same command again'
SMALLER = 'give a smaller batch or model, or split the model over more devices'


def main(words: Sequence[str] | None = None) -> int:
    """Runs one command line, by default that of the process. Returns the exit status."""
    if words is not None:
        return _run(list(words), _load)
    malloc.keep_freed_memory()  # only if the process runs one command, never in another program
    terminal.ignore_broken_pipes()
    try:
        status = _run(sys.argv[1:], _load_with_handlers)
    except SystemExit as stopped:  # after --help
        status = stopped.code
    if error := terminal.flush():
        status = _report('', f'the output cannot be written ({error.strerror})', 1)
    # The watchdog imports JAX, which few commands need.
    if watchdog := sys.modules.get('star_jax.parallel.peer_watchdog'):
        watchdog.exit_if_failed(status)
    return status


def _load(command: str) -> types.ModuleType:
    return importlib.import_module(f'star_jax.commands.{MODULES.get(command, command)}')


def _load_with_handlers(command: str) -> types.ModuleType:
    """Loads a command, with handlers that end the process in one line if a signal arrives.

    A run replaces them with its own handlers while it trains, and restores them afterwards.
    Warnings are printed in one line, too.
    """
    name = f'star-jax {command}'
    terminal.redirect_warnings(lambda warning: _report(command, f'warning: {warning}', 0))
    if command in RESUMABLE:
        statuses = dict.fromkeys((signal.SIGTERM, signal.SIGINT, signal.SIGHUP), 0)
        line = f'{name}: stopped; the same command continues the run'
        terminal.exit_on_signals(statuses, line, files.remove_unfinished)
        return _load(command)
    restore = terminal.exit_on_signals({signal.SIGINT: INTERRUPTED}, f'{name}: stopped')
    try:
        return _load(command)
    finally:
        restore()
        terminal.exit_at_once(TERMINATED, f'{name}: stopped', files.remove_unfinished)


def _run(words: list[str], load: Callable[[str], types.ModuleType]) -> int:
    command = words[0] if words else '--help'
    if command in ('-h', '--help', '--help-all'):
        sys.stdout.write(_usage())
        return 0 if words else 2
    if command == '--version':
        sys.stdout.write(_versions())
        return 0
    if command not in COMMANDS:
        similar = difflib.get_close_matches(command, COMMANDS, n=1)
        suggestion = f", did you mean '{similar[0]}'" if similar else ''
        error = f'there is no command {command!r}{suggestion}; star-jax --help lists them'
        return _report('', error, 2)
    try:
        return load(command).main(words[1:])
    except UserError as error:
        return _report(command, error, 2)
    except RunError as error:
        return _report(command, error, 1)
    except (OSError, MemoryError, RuntimeError) as error:
        return _report_resource(command, error)
    except KeyboardInterrupt:
        return _report(command, 'stopped', INTERRUPTED)


def _report_resource(command: str, error: OSError | MemoryError | RuntimeError) -> int:
    """Reports a full disk, a file that cannot be used, or too little memory; raises other errors.

    Libraries raise RuntimeErrors for each of the first and the last.
    """
    if reason := files.full_disk(error):
        return _report(command, f'nothing more can be written ({reason}): {ROOM}', 1)
    if isinstance(error, OSError):
        if error.filename is None:
            raise error
        # Too many functions access files for each of them to check permissions first.
        name, reason = os.fspath(error.filename), error.strerror or error
        sentence = f'{name} cannot be used ({reason}): change its permissions, or name another'
        return _report(command, sentence, 2)
    if not isinstance(error, MemoryError) and NO_MEMORY not in str(error):
        raise error
    return _report(command, f'the memory is too small ({error}): {SMALLER}', 1)


def _report(command: str, error: object, status: int) -> int:
    """Writes one line to stderr, escaping what cannot be printed. Returns `status`."""
    text = f'star-jax {command}'.rstrip() + ': ' + ' '.join(str(error).splitlines())
    sys.stderr.write(terminal.printable(text) + '\n')
    return status


def _usage() -> str:
    """All commands by purpose."""
    lines = ['usage: star-jax COMMAND [...]   (star-jax COMMAND --help describes its options)']
    for title, commands in JOURNEYS.items():
        lines += ['', title]
        for name, (summary, example) in commands.items():
            lines += [f'  {name:<16} {summary}', f'{"":<19}  {example}']
    return '\n'.join([*lines, ''])


def _versions() -> str:
    """The versions of this package, of Python and of the main dependencies, none imported."""
    versions = {'Python': platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in DEPENDENCIES}
    environment = ', '.join(f'{name} {version}' for name, version in versions.items())
    return f'star-jax {__version__} ({environment})\n'
