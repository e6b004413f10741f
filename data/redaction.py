"""What is private in a URL, taken out of everything that is written or said.

    https://user:password@host/shards      → https://***@host/shards
    https://host/shards?token=abc&sig=def  → https://host/shards?token=***&sig=***       what stands behind a # likewise

Of a query every value goes, since nobody knows which of them signs it. What names a variable
(``?token=${oc.env:TOKEN}``) tells nothing and stays. Settings are compared as they are written, so a new token is not a
changed setting.
"""

import re
from typing import TypeVar

HIDDEN = "***"
# A path made of a URL has one slash where this had two. A comma ends one where another follows, as in lists.
URL = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*:/+)(?P<rest>(?:[^\s@/?#\"<>`,]*:(?!\d+/)[^\s@\"<>`,]*@)?"
    r"(?:(?!,[A-Za-z][A-Za-z0-9+.-]*:/)(?:\$\{[^}]*\}|[^\s'\"<>`]))*)"
)
# A password may hold what should have been escaped; a number behind a colon is a port.
USER = re.compile(r"^(?:[^/?#]*|[^/?#@]*:(?!\d+/)[^@]*)@")
VARIABLE_PARTS = re.compile(r"(?:\$\{[^}]*\}|[:&=@])*")

Settings = TypeVar("Settings")


def redacted(text: str) -> str:
    """The text, with what is private in its URLs as ``***``."""
    return URL.sub(_redacted_url, text) if ":/" in text else text


def redacted_settings(settings: Settings) -> Settings:
    """Nested dictionaries and lists with every text in them redacted."""
    if isinstance(settings, str):
        return redacted(settings)  # type: ignore[return-value]
    if isinstance(settings, dict):
        return {key: redacted_settings(value) for key, value in settings.items()}  # type: ignore[return-value]
    if isinstance(settings, list | tuple):
        return type(settings)(redacted_settings(value) for value in settings)  # type: ignore[call-arg, return-value]
    return settings


def is_private(text: str) -> bool:
    """Whether the text holds something that is to be redacted."""
    return redacted(text) != text


def _redacted_url(match: re.Match[str]) -> str:
    rest = match["rest"]
    user = USER.match(rest)
    behind = user.end() if user else 0
    place, mark, query = re.fullmatch(r"([^?#]*)([?#]?)(.*)", rest[behind:], flags=re.DOTALL).groups()  # type: ignore[union-attr]
    # In other schemes than http a name before @ is no secret: the container of abfs://container@account.
    if (
        user
        and (":" in user[0] or match["scheme"].lower().startswith("http"))
        and not VARIABLE_PARTS.fullmatch(user[0])
    ):
        place = f"{HIDDEN}@{place}"
    else:
        place = f"{rest[:behind]}{place}"
    # What closes a sentence, a bracket or a list behind the URL is no part of it.
    query, end = re.fullmatch(r"(.*?)([)\]},.:;]*)", query, flags=re.DOTALL).groups()  # type: ignore[union-attr]
    if "${" in query and end.startswith("}"):
        query, end = f"{query}}}", end[1:]
    return f"{match['scheme']}{place}{mark}{'&'.join(map(_redacted_parameter, query.split('&')))}{end}"


def _redacted_parameter(parameter: str) -> str:
    name, equals, value = parameter.partition("=")
    if not equals:  # ?abcdef: a token alone
        name, value = "", name
    return f"{name}{equals}{value if VARIABLE_PARTS.fullmatch(value) else HIDDEN}"
