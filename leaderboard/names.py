"""Names that come from outside: as file names, as links, as text that cannot disturb a page."""

from __future__ import annotations

import hashlib
import re
from functools import lru_cache
from urllib.parse import urlsplit

_PLAIN = re.compile(r"[a-z0-9_][a-z0-9_.]*(:[a-z0-9_][a-z0-9_.]*)*")
_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?")
_VARIANT = re.compile(r"~[0-9a-f]{6}$")
_HOST = re.compile(r"(?=.{1,253}$)([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z]([a-z0-9-]{0,61}[a-z0-9])", re.IGNORECASE)
_URL_CHARS = re.compile(r"[A-Za-z0-9._~:/?#\[\]@!$&'()*+,;=%-]{9,2000}")
_UNPRINTED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def digest12(text: str) -> str:
    """First 12 hex digits of the sha256 of `text`: what a cell's page and media folder are called."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def file_name(name: str) -> str:
    """A file name (without ending) for an id; no two ids share one, on file systems that fold case either.

    A colon becomes `-`. An id with anything but lower-case letters, digits, `_` and `.` between its colons gets a
    readable remainder, `--` and a digest: no plain id has two hyphens in a row.
    """
    stem = name.replace(":", "-")
    if len(name) <= 80 and _PLAIN.fullmatch(name) and not _RESERVED.fullmatch(stem):
        return stem
    rest = re.sub(r"[^a-z0-9_]+", "_", name.lower())[:40].strip("_")
    return f"{rest}--{hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}"


@lru_cache(maxsize=100_000)
def plugin_id(label: str) -> str:
    """The id in an attack's or defense's label: without `~` and the six digits of its parameters' digest."""
    return _VARIANT.sub("", label)


def https(text: str) -> str | None:
    """`text` if it is an https address of a named host without user, port or odd characters; else None."""
    if not _URL_CHARS.fullmatch(text):
        return None
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        return None
    plain = parts.scheme == "https" and port is None and "@" not in parts.netloc
    return text if plain and _HOST.fullmatch(parts.hostname or "") else None


def linked(text: str) -> list[tuple[str, str | None]]:
    """`text` cut into pieces, each with the address it may link to or None."""
    pieces: list[tuple[str, str | None]] = []
    for word in re.split(r"(\s+)", text):
        core = word.rstrip(".,;)")
        url = https(core)
        pieces += [(core, url), (word[len(core) :], None)] if url else [(word, None)]
    return [p for p in pieces if p[0]]


def clean(text: str) -> str:
    """`text` with a replacement mark for control characters, marks that turn the reading direction, and surrogates."""
    if text.isascii() and text.isprintable():
        return text
    return _UNPRINTED.sub("\ufffd", text.replace("\r\n", "\n"))
