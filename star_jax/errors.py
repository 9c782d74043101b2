"""Which errors does the command line print as one sentence, without a traceback?"""

NO_MEMORY = 'RESOURCE_EXHAUSTED'  # in the errors of JAX and its compilers


class UserError(ValueError):
    """A mistake of the user, such as an unknown option or a missing file.

    The message is one sentence: the given value, the expected value, and what to do. The command
    line prints it and exits with status 2.
    """


class UserTypeError(UserError, TypeError):
    """An argument of a Python caller that has the wrong type."""


class RunError(Exception):
    """The reason why a run cannot continue: a full disk, a loss that is not a number.

    The message is one sentence: what happened, what is safe, and what to do. The command line
    prints it and exits with status 1.
    """


class NotFiniteError(RunError):
    """A loss or a parameter became non-finite.

    Attributes:
        flaw: which array, and at which step.
    """

    def __init__(self, sentence: str, flaw: str) -> None:
        super().__init__(sentence)
        self.flaw = flaw
