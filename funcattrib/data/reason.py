"""What went wrong inside another library, in one line for a message."""


def reason(error: BaseException) -> str:
    """The first line of what an exception says, or its type; the one that caused it goes before it."""
    while error.__cause__ is not None:  # libraries wrap the reason in general words
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
