"""Shorten what a library says of an error to what fits in a message of one line."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the error's class if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def one_line(message: object) -> str:
    """Return a message, or that of an error, without line breaks."""
    return " ".join(str(message).split())
