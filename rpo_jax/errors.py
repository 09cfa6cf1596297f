"""The one exception that means: the user can mend this."""


class UserError(ValueError):
    """Bad input, named precisely: what was wrong, where, and what to do about it.

    Commands show its message without a traceback and exit with status 2; every other exception is a
    bug of ours and keeps its traceback.
    """
