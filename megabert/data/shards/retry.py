"""Repeat requests to stores that fail, send a slow one twice, and record when a rank last waited."""

import functools
import logging
import mmap
import os
import re
import statistics
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

from tenacity import RetryCallState, RetryError, Retrying, retry_if_exception, wait_random_exponential

from megabert.data.shards.cache import PERMANENT_ERRORS
from megabert.process.error_text import one_line
from megabert.process.exit_codes import EXIT_STORE_AWAY

log = logging.getLogger(__name__)

T = TypeVar("T")


# A pause is a random part of 0.25, 0.5, 1, 2, 4, 5, 5, ... s, so that the ranks do not retry at the same moment, and
# all of them recover soon after an outage.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 5.0
# A wait of this length is logged with its URL.
LOG_AFTER_S = 10.0
# A request is made a second time if it takes longer than this many seconds and than this many times the median.
SLOW_S, SLOW_FACTOR = 1.0, 5.0
# Threads of one process: two for each thread of the read-ahead.
REQUEST_THREADS = 32
# Missing or expired credentials are looked for again for this long, because a service that issues them may be away.
CREDENTIALS_PATIENCE_S = 30.0
# What the clients of stores raise besides OSError.
STORE_ERRORS = (
    "aiohttp.ClientError",
    "azure.core.exceptions.AzureError",
    "botocore.exceptions.BotoCoreError",
    "botocore.exceptions.ClientError",
    "gcsfs.retry.ChecksumError",
    "gcsfs.retry.HttpError",
    "google.auth.exceptions.GoogleAuthError",
    "httpx.HTTPError",
    "httpx2.HTTPError",
)
# What they raise before a request is made, where they find no valid credentials.
CREDENTIAL_ERRORS = (
    "azure.core.exceptions.ClientAuthenticationError",
    "botocore.exceptions.CredentialRetrievalError",
    "botocore.exceptions.LoginError",
    "botocore.exceptions.NoAuthTokenError",
    "botocore.exceptions.NoCredentialsError",
    "botocore.exceptions.PartialCredentialsError",
    "botocore.exceptions.ProfileNotFound",
    "botocore.exceptions.SSOError",
    "botocore.exceptions.TokenRetrievalError",
    "google.auth.exceptions.DefaultCredentialsError",
    "google.auth.exceptions.RefreshError",
)
# S3's codes for credentials that s3fs raises as an OSError with EINVAL; to a HEAD request S3 answers only "400".
REFUSED_S3_CODES = {"400", "AuthorizationHeaderMalformed", "InvalidToken", "TokenRefreshRequired"}
# How webdataset describes a command that failed, after the command itself, which is in the URL already.
PIPE_ENDED = re.compile(r"exit (-?\d+) \(\w+\) \{.*\}$")
_TIME = struct.Struct("d")
LONGER = ". If it needs longer, raise data.store_patience_s."


class StoreAwayError(OSError):
    """A store that has not answered for as long as the user wants to wait."""

    exit_code = EXIT_STORE_AWAY


class RefusedError(PermissionError):
    """A store that refuses a request, so that a retry cannot help."""


@functools.cache
def _shared() -> mmap.mmap:
    """Return memory that this process shares with the workers that it forks from now on."""
    return mmap.mmap(-1, _TIME.size)


def waited_for_store_at() -> float:
    """Return when this rank last waited for a store, as of time.monotonic(); 0 if never. Call it before a fork."""
    return _TIME.unpack(_shared()[:])[0]


def waiting_for_store() -> None:
    """Record that this process waits for a store at this moment."""
    _shared()[:] = _TIME.pack(time.monotonic())


def retrying(action: Callable[[], T], url: str, patience_s: float, remedy: str = LONGER) -> T:
    """Run an action that needs the network, and repeat it after a pause if it fails, for patience_s at most.

    remedy: what a user can do if that is too short. Raises StoreAwayError with the URL when it fails for longer,
    RefusedError when a server refuses. Errors that another attempt cannot cure (no such file, a full disk) are raised
    as they are.
    """
    attempts = Retrying(
        retry=retry_if_exception(_is_temporary),
        wait=wait_random_exponential(multiplier=FIRST_PAUSE_S, max=LONGEST_PAUSE_S),
        stop=lambda state: (state.seconds_since_start or 0.0) >= _patience_s(_error_of(state.outcome), patience_s),
        before_sleep=lambda state: _log_retry(url, state),
        sleep=_pause,
    )
    try:
        return attempts(action)
    except RetryError as failed:
        last, seconds = _error_of(failed.last_attempt), attempts.statistics["delay_since_first_attempt"]
        if _lacks_credentials(last):
            raise _refused(url, last) from last
        raise StoreAwayError(
            f"{url}: failed {failed.last_attempt.attempt_number} times over {seconds:.0f} s: {_describe(last)}{remedy}"
        ) from last
    except network_errors() as error:
        if _is_refusal(error):
            raise _refused(url, error) from error
        if _status_of(error):
            raise OSError(f"{url}: {_describe(error)}") from error
        raise


def _refused(url: str, error: BaseException) -> RefusedError:
    return RefusedError(
        f"{url}: {_describe(error)}. The store refuses this request: if credentials or a signed URL are missing or "
        "have expired, renew them, then run the same command again."
    )


def _patience_s(error: BaseException, patience_s: float) -> float:
    """Return for how long an error is worth another attempt."""
    return min(patience_s, CREDENTIALS_PATIENCE_S) if _lacks_credentials(error) else patience_s


def _pause(seconds: float) -> None:
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        waiting_for_store()
        time.sleep(min(1.0, left))


def _log_retry(url: str, state: RetryCallState) -> None:
    if (state.seconds_since_start or 0.0) >= LOG_AFTER_S:
        log.warning(
            "%s: %s; still retrying after %.0f s", url, _describe(_error_of(state.outcome)), state.seconds_since_start
        )


class HedgedRequest:
    """Makes a request a second time if the first is unusually slow, and returns what arrives first."""

    def __init__(self) -> None:
        # Seconds that each of the last requests took.
        self._seconds: deque[float] = deque(maxlen=64)

    def __call__(self, request: Callable[[], T], url: str) -> T:
        """Return request(); it runs in other threads, twice at once where the first is slow. Raises what it raises."""
        began, logged, repeated = time.monotonic(), False, False
        pool = _request_pool(os.getpid())
        running = {pool.submit(self._timed, request)}
        slow_s = max(SLOW_S, SLOW_FACTOR * statistics.median(self._seconds)) if self._seconds else SLOW_S
        while True:
            left_s = 1.0 if repeated else max(0.0, began + slow_s - time.monotonic())
            done, running = wait(running, timeout=min(1.0, left_s), return_when=FIRST_COMPLETED)
            answers = [future for future in done if future.exception() is None]
            if answers or not running:
                return (answers or list(done))[0].result()
            waiting_for_store()
            waited_s = time.monotonic() - began
            if not logged and waited_s > LOG_AFTER_S:
                logged = True
                log.warning("%s: no answer for %.0f s", url, LOG_AFTER_S)
            if not repeated and waited_s >= slow_s:
                repeated = True
                running.add(pool.submit(self._timed, request))

    def _timed(self, request: Callable[[], T]) -> T:
        began = time.monotonic()
        answer = request()
        self._seconds.append(time.monotonic() - began)
        return answer


@functools.cache
def _request_pool(process: int) -> ThreadPoolExecutor:
    """Return the threads of a process that wait for answers; a fork has none of its parent's."""
    return ThreadPoolExecutor(REQUEST_THREADS, thread_name_prefix="request")


def _is_temporary(error: BaseException) -> bool:
    """Tell whether another attempt may succeed after this error."""
    if isinstance(error, FileNotFoundError) or not isinstance(error, network_errors()) or _is_refusal(error):
        return False
    if getattr(error, "errno", None) in PERMANENT_ERRORS:
        return False
    status = _status_of(error)
    # Status 408 means a timeout and 429 too many requests, so a retry may help.
    return not 400 <= status < 500 or status in (408, 429)


def _is_refusal(error: BaseException) -> bool:
    """Tell whether a store refuses the credentials. s3fs raises PermissionError without an errno, a disk with one."""
    if isinstance(error, PermissionError):
        return error.errno is None
    answer = getattr(error.__cause__, "response", None)
    if isinstance(answer, dict) and answer.get("Error", {}).get("Code") in REFUSED_S3_CODES:
        return True
    # gcsfs raises an OSError for 403.
    return _status_of(error) in (401, 403) or (isinstance(error, OSError) and str(error).startswith("Forbidden: "))


def _lacks_credentials(error: BaseException) -> bool:
    """Tell whether a client found no valid credentials."""
    return isinstance(error, _imported(CREDENTIAL_ERRORS))


def _error_of(attempt: Future | None) -> BaseException:
    error = attempt.exception() if attempt else None
    assert error is not None, "an attempt that did not fail is repeated"
    return error


def _status_of(error: BaseException) -> int:
    """Return the HTTP status of an error, 0 if it has none. Each client has another attribute for it."""
    response = getattr(error, "response", None)
    for holder, name in ((error, "status"), (error, "status_code"), (response, "status_code"), (error, "code")):
        if re.fullmatch("[1-5][0-9]{2}", str(value := getattr(holder, name, None))):
            return int(str(value))
    return 0


def _describe(error: BaseException) -> str:
    status = _status_of(error)
    if ended := PIPE_ENDED.search(str(error)):
        return f"the command ended with {ended[1]}"
    return f"HTTP {status} {one_line(getattr(error, 'message', error))}" if status else repr(error)


def network_errors() -> tuple[type[BaseException], ...]:
    """Return the exceptions that the libraries in use raise for a broken connection."""
    return (OSError, EOFError, TimeoutError, subprocess.SubprocessError, *_imported(STORE_ERRORS))


def _imported(names: tuple[str, ...]) -> tuple[type[BaseException], ...]:
    """Return the exceptions of modules that are imported: another one cannot have raised any."""
    found = [getattr(sys.modules.get(name.rpartition(".")[0]), name.rpartition(".")[2], None) for name in names]
    return tuple(error for error in found if error is not None)
