"""How does what goes wrong reach the user?"""


class UserError(Exception):
    """A mistake of the user's: one sentence saying what was given, what was expected, what to do.

    The command line prints the sentence and exits with 2; it never shows a traceback for it.
    """


class RunError(Exception):
    """Why a run cannot go on though nothing wrong was asked for: a full disk, a loss that is nan.

    One sentence: what happened, what is safe, what to do. The command line prints it and exits
    with 1; it never shows a traceback for it.
    """


class NotFiniteError(RunError):
    """A loss, or what is trained, is no number any more; `flaw` says which, and at what step."""

    def __init__(self, sentence: str, flaw: str) -> None:
        super().__init__(sentence)
        self.flaw = flaw
