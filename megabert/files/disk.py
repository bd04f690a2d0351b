"""Distinguish failures of disks and file systems from wrong names given by the user, and format sizes."""

import errno
import os

from megabert.process.exit_codes import EXIT_DISK

# What Python raises for a name that is wrong or that this user may not open; a network file system may be away instead.
WRONG_NAMES = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)
# What to do about an error whose cause is a name or a right.
REMEDIES = {
    errno.EISDIR: "A file belongs there: rename or remove the folder",
    errno.ENOTDIR: "A folder belongs there: rename or remove the file",
    errno.EEXIST: "Rename or remove it",
    errno.ENOTEMPTY: "Rename or remove it",
    errno.EACCES: "Change its owner or its rights, or choose another place",
    errno.EPERM: "Change its owner or its rights, or choose another place",
    errno.EROFS: "Choose another place",
    errno.ENAMETOOLONG: "Choose a shorter name",
    errno.ELOOP: "It is a link to itself: remove it",
    errno.ENOSPC: "Free some space and run the same command again, or choose another place",
    errno.EDQUOT: "Free some space and run the same command again, or choose another place",
    errno.EFBIG: "Raise the limit of file sizes (ulimit -f) and run the same command again",
}
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
USER_ERRORS = {errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP}


class DiskError(OSError):
    """A disk or a file system that fails or is full: another attempt, perhaps on another machine, may succeed."""

    exit_code = EXIT_DISK


def is_user_error(error: OSError) -> bool:
    """Tell whether an error is about a name or a right, which the user must change, and not about a device."""
    return isinstance(error, WRONG_NAMES) or error.errno in USER_ERRORS


def as_user_error(error: OSError, message: str) -> ValueError | DiskError:
    """Return the error to raise with this message: ValueError for an error of the user, DiskError otherwise."""
    return ValueError(message) if is_user_error(error) else DiskError(message)


def format_bytes(count: float) -> str:
    """Format a number of bytes: 194 MB, 1.9 GB."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.0f} MB"


def explain(error: OSError | UnicodeEncodeError) -> str:
    """Describe an error of the system in one line: the file, what is wrong, and the remedy if there is one.

    Some libraries pass only UTF-8 to the system, and fail to encode the name of a file that is no UTF-8.
    """
    if isinstance(error, UnicodeEncodeError):
        name = error.object
        if "\0" in name or not os.path.lexists(name):
            return str(error)
        return f"{name}: its name is not UTF-8, and a library cannot open it. Rename the file or its folder."
    if error.errno == errno.ENOENT and error.filename is None and _current_folder_is_gone():
        return "the folder that the command was started in is gone: change to another one (cd)."
    remedy = REMEDIES.get(error.errno or 0)
    if remedy is None or (error.filename is None and error.errno not in FULL):
        return str(error)
    if error.filename is None:
        return f"{error.strerror}. {remedy}."
    # If a file cannot be moved to its name, that name is the second.
    return f"{error.filename2 or error.filename}: {error.strerror}. {remedy}."


def _current_folder_is_gone() -> bool:
    """Tell whether the current folder was removed, which an error of os.getcwd() does not say."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False
