"""The exceptions that are not bugs."""

import errno

_PASSING = {
    errno.EIO,
    errno.EAGAIN,
    errno.ESTALE,
    errno.ENOTCONN,
    errno.ETIMEDOUT,
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
}


def say_install(extra: str) -> str:
    """The command that installs an extra, in the tested versions."""
    return f'pip install -c constraints.txt -e ".[{extra}]"'


class UserError(ValueError):
    """Bad input, named precisely: what was wrong, where, and what to do about it.

    Commands show its message without a traceback and exit with status 2; every other exception is a
    bug of ours and keeps its traceback.
    """

    status = 2


class PassingError(UserError):
    """What another try of the same command may mend: a host that is late, storage that is away.

    Commands exit with status 75 (EX_TEMPFAIL of sysexits.h), which launchers try again.
    """

    status = 75


class DivergedError(UserError):
    """Numbers of a run that are not finite; other runs beside it may go on."""


class Stopped(Exception):
    """A signal asked for a stop, and everything is saved. Commands exit with 128 + `signal`."""

    def __init__(self, message: str, signal: int):
        """What was stopped where, and by which signal number."""
        super().__init__(message)
        self.signal = signal


def may_pass(error: OSError) -> bool:
    """Whether storage or a network is away, so that another try may go well."""
    return isinstance(error, TimeoutError) or error.errno in _PASSING


def find_status(error: BaseException) -> int:
    """The exit status of a command that ends with an error: 1 is that of a bug."""
    if isinstance(error, UserError):
        return error.status
    if isinstance(error, OSError) and error.filename is not None:
        return PassingError.status if may_pass(error) else UserError.status
    return 1
