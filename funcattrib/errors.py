"""Errors meant for the reader: what was expected, what was found, what to do.

The command line prints them without a traceback and ends with exit code 2; any other exception is a bug.
"""


class FuncattribError(Exception):
    """An error for the reader: expected, found, what to do (one or two lines).

    Example:
        >>> from funcattrib.transforms import project
        >>> try:
        ...     project(0)
        ... except FuncattribError as error:
        ...     print(error)
        expected a projection dimension of at least 1, found 0
    """


class DataError(FuncattribError):
    """A data set that cannot be used as it is: a missing file or column, text that is not text, a row too long."""


class StoreError(FuncattribError):
    """A gradient store that cannot be opened, written or continued."""


class ChainError(FuncattribError):
    """Stages of a chain that do not fit each other, or a state that does not fit the chain."""
