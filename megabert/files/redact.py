"""Remove passwords, signatures and other secrets from texts that are printed or written to files."""

import re
from typing import Any

# scheme://user:password@host/path?query#fragment. A query may be a signature; a user may be a token.
URL = re.compile(r"([a-zA-Z][\w+.-]*://)(?:[^/\s]*@)?([^\s?#'\"]*)([?#][^\s'\"]*)?")
SECRET = r"[\w-]*(?:token|key|secret|passw(?:or)?d|signature|credential|cookie|authorization)[\w-]*"
# What commands such as curl take as secrets: headers, options, variables, logins.
HEADER = re.compile(rf"(?i)(['\"\s]{SECRET}\s*:\s*)[^'\"\n]+")
OPTION = re.compile(rf"(?i)(--{SECRET}[ =]|\b{SECRET}=)['\"]?[^\s'\"&]+")
LOGIN = re.compile(r"(\s-(?:u|-user|-proxy-user)[ =]?)['\"]?[^\s'\"]+")
HIDDEN = "..."


def redact(text: str) -> str:
    """Hide users, passwords and queries of URLs, and the secrets of pipe: commands, in a text of any kind.

    "https://me:pw@host/x.tar?sig=1 is missing" -> "https://host/x.tar?... is missing"
    """
    text = URL.sub(lambda url: url[1] + url[2] + (url[3][0] + HIDDEN if url[3] else ""), text)
    if "pipe:" not in text:
        return text
    for secret in (HEADER, OPTION, LOGIN):
        text = secret.sub(rf"\1{HIDDEN}", text)
    return text


def redact_all(value: Any) -> Any:
    """Redact every string in nested dicts, lists and tuples."""
    if isinstance(value, dict):
        return {name: redact_all(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact_all(part) for part in value]
    return redact(value) if isinstance(value, str) else value
