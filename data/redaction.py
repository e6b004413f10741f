"""What is private, in a URL or under a name that says so, taken out of everything that is written or said.

    https://user:password@host/shards      → https://***@host/shards
    https://host/shards?token=abc&sig=def  → https://host/shards?token=***&sig=***       what stands behind a # likewise
    {_target_: x.Logger, api_key: abc}     → {_target_: x.Logger, api_key: ***}          in settings, words and sentences

Of a query every value goes, since nobody knows which of them signs it. What names a variable
(``?token=${oc.env:TOKEN}``) tells nothing and stays. Settings are compared as they are written, so a new token is not a
changed setting.
"""

import re
from typing import Any, TypeVar

HIDDEN = "***"
# A path made of a URL has one slash where this had two. A comma ends one where another follows, as in lists.
URL = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*:/+)(?P<rest>(?:[^\s@/?#\"<>`,]*:(?!\d+/)[^\s@\"<>`,]*@)?"
    r"(?:(?!,[A-Za-z][A-Za-z0-9+.-]*:/)(?:\$\{[^}]*\}|[^\s'\"<>`]))*)"
)
# A password may hold what should have been escaped; a number behind a colon is a port.
USER = re.compile(r"^(?:[^/?#]*|[^/?#@]*:(?!\d+/)[^@]*)@")
VARIABLE_PARTS = re.compile(r"(?:\$\{[^}]*\}|[:&=@])*")
# How a secret's name ends, in words joined by _ . or -. A number under the latter (token=1) is none, and neither is what a
# network calls a token.
SECRET_NAME = re.compile(
    r"(?:.*[_.-])?(?:(?:(?:api|access|account|secret|private)[_-]?key|secret|password|passwd|passphrase|pwd|credentials?)"
    r"|(?P<texts_only>(?<!class.)(?<!cls.)(?<!mask.)(?<!pad.)(?<!patch.)(?<!register.)(?<!pool.)token|auth|authorization))"
)
NO_SECRET = re.compile(r"(?i)\*\*\*|null|none|true|false|")
NAMED_VALUE = re.compile(
    r"""(?<![\w.?&\#-])(?P<name>[\w.-]*(?i:key|secret|password|passwd|passphrase|pwd|credentials?|token|auth|authorization))
    (?P<to>["']?(?:=|:(?P<loose>[ \t]+)?))
    (?P<value>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|\[[^\]]*\]|\{[^}]*\}
    |(?(loose)[^,{}\[\]\n"']+?(?=[).;]*(?:[ \t]+\#|[,{}\[\]\n"']|$))   # of YAML, which has spaces in words
    |(?:\$\{[^}]*\}|[^\s,{}\[\]"'])+?(?=[).;]*(?:[\s,{}\[\]"']|$))))""",
    re.VERBOSE,
)

Settings = TypeVar("Settings")


def redacted(text: str) -> str:
    """The text, with what is private in its URLs, or named as a secret, as ``***``."""
    without = URL.sub(_redacted_url, text) if ":/" in text else text
    return NAMED_VALUE.sub(_redacted_value, without)


def redacted_settings(settings: Settings) -> Settings:
    """Nested dictionaries and lists with every text in them redacted, and every value that is named as a secret."""
    if isinstance(settings, str):
        return redacted(settings)  # type: ignore[return-value]
    if isinstance(settings, dict):
        return {key: _of_a_name(str(key), value) for key, value in settings.items()}  # type: ignore[return-value]
    if isinstance(settings, list | tuple):
        return type(settings)(redacted_settings(value) for value in settings)  # type: ignore[call-arg, return-value]
    return settings


def is_private(text: str) -> bool:
    """Whether the text holds something that is to be redacted."""
    return redacted(text) != text


def names_a_secret(name: str, value: Any) -> bool:
    """Whether a setting's name says that its ``value`` is a secret: ``api_key``, ``comet.apiKey``, ``auth_token``; not
    ``batch_tokens``."""
    found = SECRET_NAME.fullmatch(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower())
    if found is None or value is None or isinstance(value, bool):
        return False
    if not isinstance(value, str):
        return not (found["texts_only"] and isinstance(value, int | float | dict))
    plain = value.strip("'\"")
    if NO_SECRET.fullmatch(plain) or VARIABLE_PARTS.fullmatch(plain):
        return False
    return not (found["texts_only"] and re.fullmatch(r"[\d.+-]+", plain))


def _of_a_name(name: str, value: Any) -> Any:
    return HIDDEN if names_a_secret(name, value) else redacted_settings(value)


def _redacted_value(match: re.Match[str]) -> str:
    """A name and its value in a text: ``name=value``, ``'name': value``, or ``name: value`` where no sentence could be
    meant."""
    name, to, value = match.group("name", "to", "value")
    before = match.string[: match.start()].rpartition("\n")[2].rstrip(" \t")
    is_prose = to[0] == ":" and to != ":" and before != "" and before[-1] not in "{[,-"
    if is_prose or not names_a_secret(name, value):
        return f"{name}{to}{NAMED_VALUE.sub(_redacted_value, value)}"
    quote = value[0] if value[0] in "\"'" else ""
    return f"{name}{to}{quote}{HIDDEN}{quote}"


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
