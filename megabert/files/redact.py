"""Remove passwords, signatures and other secrets from texts that are printed or written to files."""

import logging
import re
from typing import Any

# scheme://user:password@host/path;parameters?query#fragment, with slashes as JSON may escape them. A query or a
# parameter may be a signature; a user may be a token; a password may contain a slash. pathlib leaves one slash of two.
URL = re.compile(
    r"((?:[a-zA-Z][\w+.-]*:\\?/|https?:|s3:|gs:)\\?/)(?:[^/\s]*@|[^/\s'\":]*:(?!\d+/)[^\s'\"]*@)?([^\s;?#'\"]*)([;?#][^\s'\"]*)?"
)
# Tokens that services mark by how they begin.
TOKEN = re.compile(r"\b(hf_|gh[a-z]_|github_pat_|glpat-|sk-|xox[a-z]-|AKIA)[\w-]{6,}")
SECRET = r"[\w-]*(?:token|key|secret|passw(?:or)?d|signature|credential|cookie|authorization)[\w-]*"
HEADER = re.compile(rf"(?i)(['\"]{SECRET}\s*:\s*)[^'\"\n]+")
COMMAND = re.compile(r"(pipe:)([^\n]*)")
WORD = re.compile(r"'[^'\n]*'|\"[^\"\n]*\"|\S+")
VARIABLE = re.compile(r"(\w+=)(?!\.\.\.)\S+")
# A URL, a path or stdout begins like this, and is no secret.
PLACE = re.compile(r"[a-zA-Z][\w+.-]*:\\?/\\?/|[./{]|-$")
HIDDEN = "..."


def redact(text: str) -> str:
    """Hide users, passwords and queries of URLs, and what pipe: commands take as options, in a text of any kind.

    "https://me:pw@host/x.tar?sig=1 is missing" -> "https://host/x.tar?... is missing"
    """
    text = URL.sub(lambda url: url[1] + url[2] + (url[3][0] + HIDDEN if url[3] else ""), text)
    text = TOKEN.sub(rf"\1{HIDDEN}", text)
    return COMMAND.sub(lambda command: command[1] + _redact_command(command[2]), text)


def _redact_command(text: str) -> str:
    """Hide the values of options and variables, and quoted words, of a command that a message may follow.

    Any option may take a secret, so only URLs, paths and words that follow no option are shown.
    """
    parts, end, after_option = [], 0, False
    for match in WORD.finditer(HEADER.sub(rf"\1{HIDDEN}", text)):
        word = match[0]
        parts.append(match.string[end : match.start()])
        end = match.end()
        is_option = word.startswith("-") and len(word) > 1 and word[1] not in ":.,'\")"
        parts.append(_redact_word(word, after_option, is_option))
        after_option = is_option and "=" not in word
        # The command ends at this word, and a message begins.
        if word[-1] in ":." and not word.endswith(HIDDEN):
            break
    rest = HEADER.sub(rf"\1{HIDDEN}", text)[end:]
    return "".join(parts) + rest


def _redact_word(word: str, after_option: bool, is_option: bool) -> str:
    if is_option:
        name, equals, _ = word.partition("=")
        if equals:
            return f"{name}={HIDDEN}"
        return word if word.startswith("--") or len(word) == 2 else f"{word[:2]}{HIDDEN}"
    if word[0] in "'\"" and word[-1] == word[0] and len(word) > 1:
        return word if HIDDEN in word or PLACE.match(word[1:]) else f"{word[0]}{HIDDEN}{word[0]}"
    if after_option and not PLACE.match(word):
        return HIDDEN
    return VARIABLE.sub(rf"\1{HIDDEN}", word) if VARIABLE.match(word) else word


def redact_all(value: Any) -> Any:
    """Redact every string in nested dicts, lists and tuples."""
    if isinstance(value, dict):
        return {name: redact_all(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact_all(part) for part in value]
    return redact(value) if isinstance(value, str) else value


class RedactedRecord(logging.LogRecord):
    """A record of logging whose message is redacted; for logging.setLogRecordFactory()."""

    def getMessage(self) -> str:
        return redact(super().getMessage())
