"""How does a user's mistake reach the user?"""


class UserError(Exception):
    """A mistake of the user's: one sentence saying what was given, what was expected, what to do.

    The command line prints the sentence and exits with 2; it never shows a traceback for it.
    """
