"""The exceptions that are not bugs."""


class UserError(ValueError):
    """Bad input, named precisely: what was wrong, where, and what to do about it.

    Commands show its message without a traceback and exit with status 2; every other exception is a
    bug of ours and keeps its traceback.
    """


class Stopped(Exception):
    """A signal asked for a stop, and everything is saved. Commands exit with 128 + `signal`."""

    def __init__(self, message: str, signal: int):
        """What was stopped where, and by which signal number."""
        super().__init__(message)
        self.signal = signal
