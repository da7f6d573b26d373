"""Run folders in, a folder of plain files out, the same to the byte every time."""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pv
import pyarrow.parquet as pq

from sleeperbench.errors import BadInput
from sleeperbench.leaderboard import charts, pages, terms, words
from sleeperbench.leaderboard.names import clean, https
from sleeperbench.leaderboard.tables import load
from sleeperbench.leaderboard.views import Views, href

MANIFEST = "SHA256SUMS"
ASSETS = ("board.css", "board.js", "icon.svg")
CSP = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; base-uri 'none'; form-action 'none'"


def _finalize(value: Any) -> Any:
    return clean(value) if type(value) is str else value


def _environment() -> jinja2.Environment:
    env = jinja2.Environment(
        loader=jinja2.PackageLoader("sleeperbench.leaderboard", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    env.globals |= {"csp": CSP, "words": words, "terms": terms, "charts": charts, "href": href, "https": https}
    return env


class Site:
    """A site being written into a folder of its own; refuses to write one path twice with different bytes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.digests: dict[str, str] = {}

    def write(self, path: str, data: bytes) -> None:
        """Write one file; the same bytes again are fine."""
        digest = hashlib.sha256(data).hexdigest()
        if self.digests.setdefault(path.lower(), digest) != digest:
            raise AssertionError(f"two pages would be {path}")
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)

    def manifest(self) -> str:
        """Digest and path of every file, as sha256sum prints them."""
        files = sorted(p for p in self.folder.rglob("*") if p.is_file())
        lines = [(hashlib.sha256(p.read_bytes()).hexdigest(), p.relative_to(self.folder).as_posix()) for p in files]
        return "".join(f"{d}  {p}\n" for d, p in lines)


def _assets(site: Site) -> dict[str, str]:
    """Copy the style sheet, script and icon under names that hold their digest."""
    names = {}
    for name in ASSETS:
        data = (resources.files("sleeperbench.leaderboard") / "static" / name).read_bytes()
        stem, _, end = name.rpartition(".")
        names[name] = f"assets/{stem}.{hashlib.sha256(data).hexdigest()[:8]}.{end}"
        site.write(names[name], data)
    return names


def _csv(table: pa.Table) -> bytes:
    """A table as CSV; text that a spreadsheet would take for a formula gets an apostrophe in front."""
    for i, field in enumerate(table.schema):
        if field.type == pa.string():
            column = table.column(i)
            formula = pc.fill_null(pc.match_substring_regex(column, r"^[=+\-@\t\r]"), False)
            marked = pc.binary_join_element_wise("'", column, "")
            table = table.set_column(i, field.name, pc.if_else(formula, marked, column))
    out = io.BytesIO()
    pv.write_csv(table, out)
    return out.getvalue()


def _downloads(site: Site, views: Views) -> None:
    for name, table in pages.downloads(views):
        out = io.BytesIO()
        pq.write_table(table, out, compression="snappy")
        site.write(f"downloads/{name}.parquet", out.getvalue())
        site.write(f"downloads/{name}.csv", _csv(table))


def _earlier(out: Path) -> set[str]:
    """The files of the site that is already in `out`, from its manifest."""
    try:
        lines = (out / MANIFEST).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        if (out / "index.html").exists():
            raise BadInput(
                f"{out} holds an index.html that `sleeperbench site` did not write: give an empty folder, or remove it"
            ) from None
        return set()
    paths = (m[1] for line in lines if (m := re.fullmatch(r"[0-9a-f]{64}  ([A-Za-z0-9_./-]+)", line)))
    return {p for p in paths if ".." not in p.split("/") and not p.startswith("/")}


def _install(built: Path, out: Path, earlier: set[str]) -> None:
    """Move a finished site into place, file by file and its index last, and remove pages that it no longer has."""
    files = {p.relative_to(built).as_posix() for p in built.rglob("*") if p.is_file()}
    for path in sorted(files, key=lambda p: (p == MANIFEST, p == "index.html", p)):
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        os.replace(built / path, out / path)
    for path in sorted(earlier - files - {MANIFEST}):
        (out / path).unlink(missing_ok=True)


def build(runs: Sequence[Path], out: Path) -> Path:
    """Render run folders into `out`; returns its index.html.

    Where two runs hold the same cell, the first counts. What an earlier site left in `out` is replaced; other files
    there stay.

    Raises:
        BadInput: a table is missing, unreadable or of another schema version, or `out` cannot be written.
    """
    views = Views(load(runs))
    env = _environment()
    try:
        out.mkdir(parents=True, exist_ok=True)
        earlier = _earlier(out)
        built = Path(tempfile.mkdtemp(prefix=".site-", dir=out))
    except OSError as e:
        raise BadInput(f"cannot write the site to {out}: {e.strerror}; give --out a folder that you may write") from e
    try:
        site = Site(built)
        env.globals |= {"assets": _assets(site), "views": views}
        for path, template, context in pages.every_page(views, site.write):
            text = env.get_template(template).render(root="../" * path.count("/"), path=path, **context)
            site.write(path, text.encode("utf-8"))
        _downloads(site, views)
        site.write("cite.bib", clean(pages.bibliography(views)).encode("utf-8"))
        (built / MANIFEST).write_text(site.manifest(), encoding="utf-8")
        _install(built, out, earlier)
    except OSError as e:
        raise BadInput(f"cannot write the site to {out}: {e.strerror}; is there space left?") from e
    finally:
        shutil.rmtree(built, ignore_errors=True)
    return out / "index.html"
