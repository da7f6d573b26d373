"""The manifest of an artifact: what it says, how it is read, and whether a folder matches it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def digest_of_manifest(m: Mapping[str, Any]) -> str:
    """sha256 of a manifest without its `digest`."""
    body = {k: v for k, v in m.items() if k != "digest"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def dump_manifest(m: Mapping[str, Any]) -> bytes:
    """The bytes of `manifest.json`."""
    return json.dumps(m, sort_keys=True).encode()


def parse_manifest(data: bytes, key: str) -> dict[str, Any]:
    """The manifest of `key` in these bytes.

    Raises:
        ValueError: they are not what was written, belong to another key, or name a file outside the artifact.
    """
    try:
        m: dict[str, Any] = json.loads(data)
        if m["key"] != key:
            raise ValueError("manifest of another key")
        if digest_of_manifest(m) != m["digest"]:
            raise ValueError("manifest does not match its own digest")
        if dump_manifest(m) != data:  # a changed byte that means the same is a changed byte
            raise ValueError("manifest is not as it was written")
        for name, want in m["files"].items():
            want["size"], want["sha256"]
            if not safe_name(name):
                raise ValueError(f"manifest names the file {name!r}")
        m["task"], m["result"]
    except (KeyError, TypeError, AttributeError, RecursionError) as e:
        raise ValueError(f"manifest unreadable ({type(e).__name__}: {e})") from e
    return m


def safe_name(name: str) -> bool:
    """Whether a file name of an artifact stays inside its folder on every system."""
    path = PurePosixPath(name)
    plain = name.isprintable() and not set(name) & set('\\:*?"<>|') and name == path.as_posix()
    return plain and not path.is_absolute() and ".." not in path.parts and name not in ("", ".", "manifest.json")


def problem_in(folder: Path, key: str) -> str:
    """What is wrong with an artifact's folder, or an empty string. Reads every byte."""
    try:
        m = parse_manifest((folder / "manifest.json").read_bytes(), key)
        for name, want in m["files"].items():
            file = folder / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != want["size"] or file_digest(file) != want["sha256"]:
                return f"{name} does not match its digest"
    except FileNotFoundError:
        return "it is missing"
    except (OSError, ValueError) as e:
        return str(e)
    return ""
