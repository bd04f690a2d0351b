"""Shorten the message of an error to one line."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the error's class if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def one_line(message: object) -> str:
    """Return a message, or an error's message, without line breaks."""
    return " ".join(str(message).split())
