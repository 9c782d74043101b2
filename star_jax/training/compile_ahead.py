"""How are the programs of a run compiled before they are needed?

One thread compiles one after the other, while the caller runs those that are ready. A jitted
function that was lowered and compiled for some shapes and shardings is not compiled again when it
is called with such arrays.
"""

import threading
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import Future


class CompileAhead:
    """Compiles programs in the background, in the order in which they are given.

    Programs that have not begun when the main thread ends are left out, so that a command that
    stops waits for one of them at most.
    """

    def __init__(self) -> None:
        self._programs: Mapping[Hashable, Future[None]] = {}

    @property
    def started(self) -> bool:
        """Whether programs were given."""
        return bool(self._programs)

    def start(self, compiled: Mapping[Hashable, Callable[[], None]]) -> None:
        """Starts; `compiled` has a function for each name, which compiles the program."""
        self._programs = {name: Future() for name in compiled}
        works = list(zip(compiled.values(), self._programs.values(), strict=True))
        # Python waits for this thread at its end, but tasks of an executor would all be run first.
        threading.Thread(target=_run, args=(works,), name='compile').start()

    def wait(self, name: Hashable) -> None:
        """Returns when a program is compiled; raises what its compilation raised."""
        self._programs[name].result()


def _run(works: list[tuple[Callable[[], None], 'Future[None]']]) -> None:
    for compile_program, future in works:
        if not threading.main_thread().is_alive():
            return
        try:
            future.set_result(compile_program())
        except BaseException as error:
            future.set_exception(error)
