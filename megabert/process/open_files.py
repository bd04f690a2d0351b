"""Raise the limit of files that a process may open."""

import resource


def allow_open_files(needed: int) -> None:
    """Raise this process's limit of open files as far as the system lets it. Raises ValueError if that is too low.

    Each later failure would have another form, in a thread or a C++ library, and some would leave ranks waiting.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ValueError(
            f"a process may open only {hard} files here (ulimit -Hn), expected at least {needed}. Raise the limit, as "
            f"with ulimit -n {max(4096, needed)} in the shell that starts the command."
        )
