"""`star-jax COMMAND`: where does a command line go?

Every command is a module of `star_jax/commands` with `main(arguments) -> exit status`. A user's
mistake ends in one sentence and exit status 2, a run that cannot go on in one and exit status 1.
"""

import difflib
import importlib
import os
import signal
import sys
import types
from collections.abc import Callable, Sequence

from star_jax import terminal
from star_jax.errors import RunError, UserError
from star_jax.parallel import malloc

COMMANDS = {
    'train': 'train a transformer on captioned images',
    'train-tokenizer': 'train an image tokenizer',
    'sample': 'draw images from prompts',
    'reconstruct': 'show what a tokenizer keeps of images, scale by scale',
    'convert': 'make a model folder of a published file, and the other way round',
    'export': 'write the model folder of a run at any time',
    'data': 'prepare a data set, or look at one',
    'verify': 'compare recorded cases of the originals with this code',
    'evaluate': 'score a model or a tokenizer on images that it never saw',
    'plan': 'say what a run needs and takes on a TPU pod or GPUs, before paying',
    'bench': 'measure drawing, training, attention and reading',
    'study': 'train configs under equal conditions and compare them',
}
MODULES = {'train-tokenizer': 'train_tokenizer'}
RESUMED = ('train', 'train-tokenizer')  # the same command goes on: to be stopped is no failure
STOPPED = 130  # by ctrl-c, as shells have it
NO_MEMORY = 'RESOURCE_EXHAUSTED'  # in what JAX raises
SMALLER = 'give a smaller batch or model, or split the model over more devices'


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; the exit status. Without arguments it takes those of the process."""
    if arguments is not None:
        return _run(list(arguments), _load)
    malloc.keep_freed_memory()  # where the process is one command, and never in somebody else's
    terminal.ignore_broken_pipes()
    try:
        status = _run(sys.argv[1:], _load_quietly)
    except SystemExit as stopped:  # after a --help
        status = stopped.code
    if error := terminal.flush():
        status = _tell('', f'what it says cannot be written ({error.strerror})', 1)
    if watchdog := sys.modules.get('star_jax.parallel.peer_watchdog'):  # its import takes JAX
        watchdog.exit_if_failed(status)
    return status


def _load(command: str) -> types.ModuleType:
    return importlib.import_module(f'star_jax.commands.{MODULES.get(command, command)}')


def _load_quietly(command: str) -> types.ModuleType:
    """Signals that come while the command loads, before it is ready for them, end it in one line.

    A run's own handlers take their place while it trains, and then give it back. Warnings are told
    in one line, too.
    """
    name = f'star-jax {command}'
    terminal.redirect_warnings(lambda warning: _tell(command, f'warning: {warning}', 0))
    if command in RESUMED:
        at_once = dict.fromkeys((signal.SIGTERM, signal.SIGINT), 0)
        terminal.exit_on_signals(at_once, f'{name}: stopped; the same command goes on')
        return _load(command)
    undo = terminal.exit_on_signals({signal.SIGINT: STOPPED}, f'{name}: stopped')
    try:
        return _load(command)
    finally:
        undo()


def _run(arguments: list[str], load: Callable[[str], types.ModuleType]) -> int:
    command = arguments[0] if arguments else '--help'
    if command in ('-h', '--help'):
        sys.stdout.write(_usage())
        return 0 if arguments else 2
    if command not in COMMANDS:
        close = difflib.get_close_matches(command, COMMANDS, n=1)
        guess = f", did you mean '{close[0]}'" if close else ''
        return _tell('', f'there is no command {command!r}{guess}; star-jax --help lists them', 2)
    try:
        return load(command).main(arguments[1:])
    except UserError as error:
        return _tell(command, error, 2)
    except RunError as error:
        return _tell(command, error, 1)
    except OSError as error:
        if error.filename is None:
            raise
        # A place is looked at in so many ways that not each asks first whether it may.
        name, reason = os.fspath(error.filename), error.strerror or error
        return _tell(command, f'{name} cannot be used ({reason}): allow it, or name another', 2)
    except KeyboardInterrupt:
        return _tell(command, 'stopped', STOPPED)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and NO_MEMORY not in str(error):
            raise
        return _tell(command, f'the memory is too small ({error}): {SMALLER}', 1)


def _tell(command: str, error: object, status: int) -> int:
    """Writes one line and gives back the exit status; what cannot be printed is escaped."""
    text = f'star-jax {command}'.rstrip() + ': ' + ' '.join(str(error).splitlines())
    sys.stderr.write(text.encode(errors='backslashreplace').decode() + '\n')
    return status


def _usage() -> str:
    lines = [f'  {name:<16} {says}' for name, says in COMMANDS.items()]
    head = 'usage: star-jax COMMAND [...]   (star-jax COMMAND --help explains one)'
    return '\n'.join([head, '', *lines, ''])
