"""Failures of disks and file systems, told apart from names that a user got wrong."""

import errno

from megabert.process.exit_codes import EXIT_DISK

# What Python raises for a name that is wrong or that this user may not open; a network file system may be away instead.
WRONG_NAMES = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)
MISTAKES = {errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP}


class DiskError(OSError):
    """A disk or a file system that fails or is full: another attempt, perhaps on another machine, may succeed."""

    exit_code = EXIT_DISK


def is_mistake(error: OSError) -> bool:
    """Tell whether an error is about a name or a right, which the user must change, and not about a device."""
    return isinstance(error, WRONG_NAMES) or error.errno in MISTAKES


def as_mistake(error: OSError, message: str) -> ValueError | DiskError:
    """Return the error to raise with this message: ValueError for a mistake of the user, DiskError otherwise."""
    return ValueError(message) if is_mistake(error) else DiskError(message)
