"""Run folders in, a folder of plain files out, the same to the byte every time."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import io
import multiprocessing
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from importlib import resources
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import jinja2
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pv
import pyarrow.parquet as pq
from jinja2.compiler import CodeGenerator

from sleeperbench.errors import BadInput
from sleeperbench.leaderboard import changes, charts, entries, markup, pages, terms, words
from sleeperbench.leaderboard.names import clean, https
from sleeperbench.leaderboard.tables import load
from sleeperbench.leaderboard.views import Views, href

MANIFEST = "SHA256SUMS"
NAV = (
    ("index.html", "Overview"),
    ("tracks.html", "Tracks"),
    ("table.html", "Table"),
    ("heatmap.html", "Heat maps"),
    ("sweeps.html", "Sweeps"),
    ("compare.html", "Compare"),
    ("figures.html", "Figures"),
    ("protocol.html", "Protocol"),
    ("submit.html", "Submit"),
    ("changelog.html", "Changelog"),
)
CSP = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; base-uri 'none'; form-action 'none'"


class _Printing(CodeGenerator):
    """Has templates print through `markup.shown` alone, which knows most texts by heart; no finalize, no escape.

    Cell pages print three hundred texts each. Where Jinja does not ask this class, finalize and autoescape still hold.
    """

    def _output_child_pre(self, node: Any, frame: Any, finalize: Any) -> None:
        if frame.eval_ctx.volatile or not frame.eval_ctx.autoescape:
            super()._output_child_pre(node, frame, finalize)
        else:
            self.write("environment.shown(")

    def _output_child_post(self, node: Any, frame: Any, finalize: Any) -> None:
        if frame.eval_ctx.volatile or not frame.eval_ctx.autoescape:
            super()._output_child_post(node, frame, finalize)
        else:
            self.write(")")


class _Environment(jinja2.Environment):
    code_generator_class = _Printing
    shown = staticmethod(markup.shown)

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._known: dict[Any, jinja2.Template] = {}

    def get_template(self, name: Any, parent: Any = None, globals: Any = None) -> jinja2.Template:
        """The template, from a plain dictionary: every page asks for its own and for the frame around it."""
        if name not in self._known:
            self._known[name] = super().get_template(name, parent, globals)
        return self._known[name]


def _finalize(value: Any) -> Any:
    return clean(value) if type(value) is str else value


def _environment() -> jinja2.Environment:
    env = _Environment(
        loader=jinja2.PackageLoader("sleeperbench.leaderboard", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        auto_reload=False,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    env.globals |= {"csp": CSP, "words": words, "terms": terms, "charts": charts, "href": href, "https": https}
    env.globals |= {"nav": NAV, "once": _once(), "lines": markup.lines, "figure_fields": markup.figure_fields}
    return env


def _once() -> Callable[[Any, Callable[[Any], Any]], Any]:
    """A template's function that renders what many pages share a single time, by the object that it shows."""
    done: dict[int, tuple[Any, Any]] = {}

    def once(shown: Any, macro: Callable[[Any], Any]) -> Any:
        if id(shown) not in done:
            done[id(shown)] = shown, macro(shown)  # kept with it, so that no other object gets its id
        return done[id(shown)][1]

    return once


class Site:
    """A site being written into a folder of its own; refuses to write one path twice with different bytes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, tuple[str, str]] = {}
        self.made: set[str] = set()

    def write(self, path: str, data: bytes) -> None:
        """Write one file; the same bytes again are fine."""
        digest = hashlib.sha256(data).hexdigest()
        name, known = self.files.setdefault(path.lower(), (path, digest))
        if known != digest:
            raise AssertionError(f"two pages would be {path}")
        folder = path.rpartition("/")[0]
        if folder not in self.made:
            (self.folder / folder).mkdir(parents=True, exist_ok=True)
            self.made.add(folder)
        with open(f"{self.folder}/{name}", "wb") as f:
            f.write(data)

    def take(self, files: Mapping[str, tuple[str, str]]) -> None:
        """Enter what another process wrote."""
        for key, found in files.items():
            if self.files.setdefault(key, found) != found:
                raise AssertionError(f"two pages would be {found[0]}")

    def manifest(self) -> str:
        """Digest and path of every file, as sha256sum prints them."""
        return "".join(f"{digest}  {path}\n" for path, digest in sorted(self.files.values(), key=lambda f: f[0]))


def _assets(site: Site) -> dict[str, str]:
    """Copy style sheets, scripts and icon, and others' code with its licences, under names that hold their digest."""
    names = {}
    static = resources.files("sleeperbench.leaderboard") / "static"
    for file in sorted((*static.iterdir(), *(static / "vendor").iterdir()), key=lambda f: f.name):
        if file.is_file() and file.name != "vendor.lock.json":
            data = file.read_bytes()
            stem, _, end = file.name.rpartition(".")
            names[file.name] = f"assets/{stem}.{hashlib.sha256(data).hexdigest()[:8]}.{end}"
            site.write(names[file.name], data)
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


def _install(built: Path, files: set[str], out: Path, earlier: set[str]) -> None:
    """Move a finished site into place, file by file and its index last, and remove pages that it no longer has."""
    for folder in {f.rpartition("/")[0] for f in files}:
        (out / folder).mkdir(parents=True, exist_ok=True)
    for path in sorted(files, key=lambda p: (p == MANIFEST, p == "index.html", p)):
        os.replace(f"{built}/{path}", f"{out}/{path}")
    for path in sorted(earlier - files - {MANIFEST}):
        (out / path).unlink(missing_ok=True)


@contextlib.contextmanager
def _kept() -> Iterator[None]:
    """What is made meanwhile stays to the end of a build, so no collection need go through it now or later."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was:
            gc.enable()


MANY = 2000
"""Cells from which a second process pays: it costs the memory that both of them touch."""


def _several() -> bool:
    """Whether this process may use a second core, and may share with a second process what it has read."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    return cores > 1 and "fork" in multiprocessing.get_all_start_methods()


def _work(work: Callable[[], None], site: Site, pipe: Connection) -> None:
    try:
        work()
        pipe.send(site.files)
    except OSError as e:
        pipe.send(e)


@contextlib.contextmanager
def _beside(site: Site, work: Callable[[], None], count: int) -> Iterator[None]:
    """Has `work` done by a second process while the body runs, where there is enough of it; else before the body."""
    if count < MANY or not _several():
        work()
        yield
        return
    context = multiprocessing.get_context("fork")
    pipe, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(work, site, theirs), daemon=True)
    with warnings.catch_warnings():
        # Newer Pythons warn of threads that a fork leaves behind: pyarrow's, which start again where they are needed.
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    theirs.close()
    try:
        yield
        try:
            found = pipe.recv()
        except EOFError:
            raise RuntimeError("the process that writes the pages of cells ended early") from None
        if isinstance(found, OSError):
            raise found
        site.take(found)
    finally:
        process.terminate()
        process.join()


def build(runs: Sequence[Path], out: Path) -> Path:
    """Render run folders into `out`; returns its index.html.

    Where two runs hold the same cell, the first counts. What an earlier site left in `out` is replaced; other files
    there stay.

    Raises:
        BadInput: a table is missing, unreadable or of another schema version, or `out` cannot be written.
    """
    try:
        return _build(runs, out)
    finally:
        gc.unfreeze()


def _build(runs: Sequence[Path], out: Path) -> Path:
    with _kept():
        views = Views(load(runs))
        _ = views.rows
    env = _environment()
    try:
        out.mkdir(parents=True, exist_ok=True)
        earlier = _earlier(out)
        built = Path(tempfile.mkdtemp(prefix=".site-", dir=out))
    except OSError as e:
        raise BadInput(f"cannot write the site to {out}: {e.strerror}; give --out a folder that you may write") from e
    try:
        site = Site(built)
        env.globals |= {"assets": _assets(site), "views": views, "made_of": changes.foot(views.results.runs)}
        macros = lru_cache(lambda root: env.get_template("macros.html.j2").make_module({"root": root}))

        def render(some: Iterable[entries.Page]) -> None:
            for path, template, context in some:
                root = "../" * path.count("/")
                text = env.get_template(template).render(root=root, path=path, m=macros(root), **context)
                site.write(path, text.encode("utf-8"))

        with _beside(site, lambda: render(entries.cells(views, site.write)), len(views.rows)):
            render(pages.every_page(views, site.write))
            _downloads(site, views)
            site.write("cite.bib", clean(pages.bibliography(views)).encode("utf-8"))
        (built / MANIFEST).write_text(site.manifest(), encoding="utf-8")
        _install(built, {path for path, _ in site.files.values()} | {MANIFEST}, out, earlier)
    except OSError as e:
        raise BadInput(f"cannot write the site to {out}: {e.strerror}; is there space left?") from e
    finally:
        shutil.rmtree(built, ignore_errors=True)
    return out / "index.html"
