from __future__ import annotations

import base64
import csv
import errno
import hashlib
import json
import os
import re
import subprocess
import sys
from importlib import resources
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pyarrow.parquet as pq
import pytest
import synthetic
from jinja2 import UndefinedError
from markupsafe import Markup
from page_reader import Page, board_rows, read
from synthetic import HOSTILE_DEFENSE, JS_LINK

from sleeperbench.errors import BadInput
from sleeperbench.leaderboard import build as build_module
from sleeperbench.leaderboard import names
from sleeperbench.leaderboard.build import CSP, _environment, build
from sleeperbench.leaderboard.tables import load
from sleeperbench.schema import CELLS, HEADLINE_METRICS, MEASUREMENTS, arrow

STATIC = Path(build_module.__file__).parent / "static"
TESTS = Path(__file__).resolve().parents[1]


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_all_promised_pages_are_there(site: Path, hostile_run: Path) -> None:
    have = set(files(site))
    wanted = ["index", "table", "heatmap", "compare", "figures", "protocol", "submit", "changelog"]
    assert {f"{p}.html" for p in wanted} <= have
    assert {f"downloads/{t}.{e}" for t in ("cells", "measurements") for e in ("parquet", "csv")} <= have
    assert {"cite.bib", "defenses/unlearn-ft.html", "attacks/blended.html", "datasets/digits.html"} <= have
    assert {f"metrics/{m}.html" for m in (*HEADLINE_METRICS, "det_tpr")} <= have
    for cell in load([hostile_run]).cells:
        assert f"cells/{names.digest12(cell['cell'])}.html" in have


def test_two_builds_are_equal_to_the_byte(site: Path, hostile_run: Path, tmp_path: Path) -> None:
    build([hostile_run], tmp_path / "again")
    assert files(tmp_path / "again") == files(site)


def test_pages_are_well_formed(pages: dict[str, Page]) -> None:
    assert {name: p.wrong for name, p in pages.items() if p.wrong} == {}
    for name, p in pages.items():
        ids = [t.attrs["id"] for t in p.tags if "id" in t.attrs]
        assert len(ids) == len(set(ids)), name
        assert len(p.root.all("h1")) == len(p.root.all("main")) == 1, name


def test_hostile_text_is_inert(pages: dict[str, Page]) -> None:
    shown = 0
    for name, page in pages.items():
        scripts = [t for t in page.tags if t.name == "script"]
        assert len(scripts) in (2, 3, 4), name
        for script in scripts:
            known = r"(\.\./)?assets/(theme|board|dataTables\.min|table|compare)\.[0-9a-f]{8}\.js"
            assert re.fullmatch(known, script.attrs["src"])
            assert script.text == ""
        for t in page.tags:
            assert t.name not in ("style", "iframe", "object", "embed", "form", "base"), name
            assert not [a for a in t.attrs if a.startswith("on") or a in ("style", "srcdoc", "action")], (name, t)
            for a in ("href", "src"):
                assert not re.match(r"\s*(javascript|data|vbscript):", t.attrs.get(a, ""), re.IGNORECASE), (name, t)
        shown += page.root.text.count("<script>alert(1)</script>")
        assert not re.search("[\u202a-\u202e\u2066-\u2069\u0007]", page.text), name
    assert shown > 50, "the strings are there to be read"


def test_every_page_has_the_policy_before_anything_is_loaded(pages: dict[str, Page]) -> None:
    for page in pages.values():
        metas = [t for t in page.tags if t.attrs.get("http-equiv") == "Content-Security-Policy"]
        assert [t.attrs["content"] for t in metas] == [CSP]
        first_load = min(i for i, t in enumerate(page.tags) if t.name in ("link", "script", "img"))
        assert page.tags.index(metas[0]) < first_load
    assert "'unsafe" not in CSP
    assert CSP.startswith("default-src 'none';")


def test_nothing_is_loaded_from_another_host_and_every_link_resolves(pages: dict[str, Page], site: Path) -> None:
    outside = set()
    for name, page in pages.items():
        for t in page.tags:
            for a in ("href", "src"):
                target = t.attrs.get(a)
                if target is None:
                    continue
                parts = urlsplit(target)
                if parts.scheme or parts.netloc:
                    assert t.name == "a", (name, target)
                    assert parts.scheme == "https"
                    assert "noopener" in t.attrs["rel"]
                    outside.add(target)
                elif parts.path:
                    assert (site / name).parent.joinpath(unquote(parts.path)).resolve().is_file(), (name, target)
                else:
                    assert any(x.attrs.get("id") == parts.fragment for x in page.tags), (name, target)
    assert outside == {"https://example.org/badnets", "https://ok.example.org/a?b=1&c=2"}


def test_a_link_that_is_refused_is_still_shown(pages: dict[str, Page]) -> None:
    assert JS_LINK in pages[f"defenses/{names.file_name(HOSTILE_DEFENSE)}.html"].root.text


def test_style_and_script_ask_no_other_host(site: Path) -> None:
    own = {p.name for p in STATIC.iterdir() if p.is_file()}
    for asset in (site / "assets").iterdir():
        text = asset.read_text().replace('"http://www.w3.org/2000/svg"', "")
        stem, digest, end = asset.name.rsplit(".", 2)
        assert digest == hashlib.sha256(asset.read_bytes()).hexdigest()[:8]
        for word in ("eval(", "new Function", "@import", "document.write", "sourceMappingURL"):
            assert word not in text
        if f"{stem}.{end}" not in own:
            continue  # others' code names its home in messages; the policy lets no page ask it for anything
        assert "//" not in re.sub(r"^\s*//.*$", "", text, flags=re.MULTILINE).replace("://", "//")
        for word in ("innerHTML", "url(", "fetch("):
            assert word not in text


@pytest.mark.parametrize("folder", [STATIC / "vendor", TESTS / "browser" / "vendor"], ids=["site", "tests"])
def test_code_of_others_is_unaltered_and_licensed(folder: Path) -> None:
    lock = json.loads((folder / "vendor.lock.json").read_text(encoding="utf-8"))
    files = {name: digest for package in lock.values() for name, digest in package["files"].items()}
    assert {p.name for p in folder.iterdir()} == {*files, "vendor.lock.json"}
    for name, digest in files.items():
        data = (folder / name).read_bytes()
        assert digest == f"sha384-{base64.b64encode(hashlib.sha384(data).digest()).decode()}", name
        assert len(data) < 1_000_000
    for name, package in lock.items():
        assert package["licence"] in ("MIT", "MPL-2.0")
        assert package["package"] == f"npm {name}@{package['version']}"
        assert package["integrity"].startswith("sha512-")
        assert any(f.startswith("LICENSE") for f in package["files"])
        (script,) = (f for f in package["files"] if f.endswith(".js"))
        assert package["version"] in (folder / script).read_text(encoding="utf-8")[:100]


def test_the_licence_of_others_code_lies_beside_it_and_is_linked(site: Path, pages: dict[str, Page]) -> None:
    (licence,) = (site / "assets").glob("LICENSE.*")
    assert licence.read_bytes() == (STATIC / "vendor" / "LICENSE.datatables.net.txt").read_bytes()
    assert "Permission is hereby granted" in licence.read_text()
    links = {t.attrs.get("href") for t in pages["table.html"].tags if t.name == "a"}
    assert f"assets/{licence.name}" in links
    assert not list(site.rglob("vendor.lock.json"))


@pytest.mark.skipif(not build_module._several(), reason="allowed: one core, or no fork on this system")
def test_two_processes_write_what_one_does(hostile_run: Path, site: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_module, "MANY", 0)
        build([hostile_run], tmp_path / "two")
    assert files(tmp_path / "two") == files(site)


@pytest.mark.skipif(not build_module._several(), reason="allowed: one core, or no fork on this system")
def test_what_stops_the_second_process_stops_the_build(
    hostile_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = os.getpid()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def gone(*_: object) -> None:
        assert os.getpid() != here
        os._exit(3)

    monkeypatch.setattr(build_module, "MANY", 0)
    monkeypatch.setattr(build_module.entries, "cells", full)
    with pytest.raises(BadInput, match="is there space left"):
        build([hostile_run], tmp_path / "out")
    monkeypatch.setattr(build_module.entries, "cells", gone)
    with pytest.raises(RuntimeError, match="ended early"):
        build([hostile_run], tmp_path / "out")
    assert not [p for p in (tmp_path / "out").rglob("*") if p.is_file()], "nothing of a broken build is left"


def test_the_suites_secret_is_not_published(site: Path) -> None:
    assert not [n for n, data in files(site).items() if b"do-not-show-this" in data]


def test_downloads_hold_the_tables(site: Path, hostile_run: Path) -> None:
    for name, columns, keys in (
        ("cells", CELLS, ["cell"]),
        ("measurements", MEASUREMENTS, ["cell", "task_key", "metric", "qualifier"]),
    ):
        mine = pq.read_table(site / "downloads" / f"{name}.parquet")
        order = [(k, "ascending") for k in keys]
        assert mine.schema.equals(arrow(columns), check_metadata=True)
        theirs = pq.read_table(hostile_run / f"{name}.parquet").sort_by(order)
        assert list(map(repr, mine.sort_by(order).to_pylist())) == list(map(repr, theirs.to_pylist()))
        assert mine.schema.metadata[b"sleeperbench.schema"] == b"1"
        with (site / "downloads" / f"{name}.csv").open(newline="", encoding="utf-8") as f:
            rows = list(csv.DictReader(f))
        assert len(rows) == len(mine)
        assert list(rows[0]) == mine.column_names
    with (site / "downloads" / "cells.csv").open(newline="", encoding="utf-8") as f:
        assert [r["attack_params"] for r in csv.DictReader(f) if "calc" in r["attack_params"]] == [
            "'=cmd|' /C calc'!A0"
        ]


def test_the_bibliography_has_every_entry_once(site: Path) -> None:
    text = (site / "cite.bib").read_text()
    assert text.count("@misc{sleeperbench,") == text.count("@misc{b}") == 1


def test_the_manifest_lists_every_file(site: Path) -> None:
    lines = [line.split("  ") for line in (site / "SHA256SUMS").read_text().splitlines()]
    have = {n: hashlib.sha256(d).hexdigest() for n, d in files(site).items() if n != "SHA256SUMS"}
    assert {n: d for d, n in lines} == have


def test_a_smaller_site_leaves_no_page_of_the_larger_one(tmp_path: Path) -> None:
    large = synthetic.write_run(tmp_path / "l", *synthetic.tables(1, ["badnets", "sig"], ["none", "ft"], 1))
    small = synthetic.write_run(tmp_path / "s", *synthetic.tables(1, ["badnets"], ["none", "ft"], 1))
    build([large], tmp_path / "out")
    (tmp_path / "out" / "CNAME").write_text("mine")
    build([small], tmp_path / "out")
    build([small], tmp_path / "fresh")
    kept = files(tmp_path / "out")
    assert kept.pop("CNAME") == b"mine"
    assert kept == files(tmp_path / "fresh")


def test_a_manifest_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    run = synthetic.write_run(tmp_path / "r", *synthetic.tables(1, ["badnets"], ["none"], 1))
    (tmp_path / "victim").write_text("here")
    (tmp_path / "out").mkdir()
    lines = [f"{'0' * 64}  {p}\n" for p in ("../victim", f"{tmp_path}/victim", "a/../../victim")]
    (tmp_path / "out" / "SHA256SUMS").write_text("".join(lines))
    build([run], tmp_path / "out")
    assert (tmp_path / "victim").read_text() == "here"


def test_someone_elses_index_is_not_overwritten(tmp_path: Path) -> None:
    run = synthetic.write_run(tmp_path / "r", *synthetic.tables(1, ["badnets"], ["none"], 1))
    (tmp_path / "index.html").write_text("mine")
    with pytest.raises(BadInput, match="did not write"):
        build([run], tmp_path)
    assert (tmp_path / "index.html").read_text() == "mine"


def test_a_run_without_cells_gives_a_site(tmp_path: Path) -> None:
    page = read(build([synthetic.write_run(tmp_path / "r", [], [])], tmp_path / "s"))
    assert "The runs hold no cells." in page.root.text
    assert not page.wrong


@pytest.mark.parametrize(
    ("actual", "said"),
    [(0.1, "10 %"), (0.0725, "10 % asked for, 7.2 % poisoned"), (0.5, "10 % asked for, 50.0 % poisoned")],
)
def test_a_cells_page_says_how_much_was_poisoned_where_that_is_another_share(
    tmp_path: Path, actual: float, said: str
) -> None:
    cell = synthetic.cell_row("sig", 0.1, "none", 0, o_asr=0.9, rate_actual=actual)
    build([synthetic.write_run(tmp_path / "r", [cell], [])], tmp_path / "s")
    page = read(tmp_path / "s" / "cells" / f"{names.digest12(cell['cell'])}.html")
    assert [d.all("dd")[0].text for d in page.root.all("div") if [t.text for t in d.all("dt")] == ["Poison rate"]] == [
        said
    ]


def test_no_torch_is_imported(hostile_run: Path, tmp_path: Path) -> None:
    code = (
        "import json, sys; from sleeperbench.cli import main;"
        f"code = main(['site', '--results', {str(hostile_run)!r}, '--out', {str(tmp_path / 's')!r}]);"
        "print(json.dumps([code, [m for m in ('torch', 'sklearn') if m in sys.modules]]))"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    site_line, report = done.stdout.splitlines()
    assert json.loads(report) == [0, []]
    assert site_line == f"site: {(tmp_path / 's' / 'index.html').resolve()}"


def test_help_imports_neither_jinja_nor_matplotlib() -> None:
    code = (
        "import sys\nfrom sleeperbench.cli import main\ntry: main(['site', '--help'])\nexcept SystemExit: pass\n"
        "print([m for m in ('jinja2', 'matplotlib', 'pyarrow', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_texts_are_printed_escaped_whatever_their_type() -> None:
    env = _environment()
    assert env.from_string("{{ a }}|{{ a }}").render(a="<b>&\u202e") == "&lt;b&gt;&amp;\ufffd|&lt;b&gt;&amp;\ufffd"
    assert env.from_string("{{ a }}").render(a=["<b>"]) == "[&#39;&lt;b&gt;&#39;]"
    assert env.from_string("{{ a }}").render(a=Markup("<b>")) == "<b>"
    assert env.from_string("{% macro m(x) %}<i>{{ x }}</i>{% endmacro %}{{ m(a) }}").render(a="<") == "<i>&lt;</i>"
    assert env.from_string("{{ a ~ '<' }}{{ a|upper }}").render(a="<x") == "&lt;x&lt;&lt;X"
    assert env.autoescape is True
    with pytest.raises(UndefinedError):
        env.from_string("{{ nothing }}").render()


def _luminance(colour: str) -> float:
    parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    r, g, b = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def _contrast(a: str, b: str) -> float:
    low, high = sorted((_luminance(a), _luminance(b)))
    return (high + 0.05) / (low + 0.05)


def _palettes() -> dict[str, dict[str, str]]:
    """The colours of light, of dark by the system's choice, and of dark by the reader's."""
    css = (resources.files("sleeperbench.leaderboard") / "static" / "board.css").read_text()
    heads = {
        "light": r":root",
        "system": r":root:not\(\[data-theme=\"light\"\]\)",
        "dark": r':root\[data-theme="dark"\]',
    }
    found = {}
    for name, head in heads.items():
        block = re.search(rf"^ *{head} \{{\s*(--bg:[^}}]*)\}}", css, flags=re.MULTILINE)
        assert block, name
        found[name] = dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]{6});", block[1]))
    return found


def test_dark_by_choice_is_dark_by_system() -> None:
    palettes = _palettes()
    assert palettes["system"] == palettes["dark"]
    assert palettes["light"].keys() == palettes["dark"].keys()


@pytest.mark.parametrize("name", ["light", "dark"])
def test_colours_have_contrast(name: str) -> None:
    colour = _palettes()[name]
    for text in ("fg", "soft", "link", "weak"):
        for ground in ("bg", "panel"):
            assert _contrast(colour[text], colour[ground]) >= 4.5, (text, ground)
    assert _contrast(colour["fg"], colour["badge"]) >= 4.5
    assert _contrast(colour["fg"], colour["note"]) >= 4.5
    marks = ("defense", "control", "oracle", "focus", *(f"s{i}" for i in range(6)))
    assert {m: _contrast(colour[m], colour["bg"]) >= 3 for m in marks} == dict.fromkeys(marks, True)
    inks = [*["fg"] * 3, "on-h3", "on-h5", "on-h5"]
    for level, ink in enumerate(inks):
        assert _contrast(colour[ink], colour[f"h{level}"]) >= 4.5, level
    shades = [_luminance(colour[f"h{i}"]) for i in range(6)]
    assert shades == sorted(shades, reverse=name == "light"), "shades are told apart without their hue"


def test_a_larger_board_stays_in_small_pages(tmp_path: Path) -> None:
    defenses = ["none", "clean_model", *[f"defense_{i}" for i in range(30)]]
    made = synthetic.tables(3, ["none", "badnets", "weakling", "sig"], defenses, 6)
    out = build([synthetic.write_run(tmp_path / "r", *made)], tmp_path / "s").parent
    sizes = {p.name: p.stat().st_size for p in out.glob("table*.html")}
    assert len(sizes) > 3
    assert max(sizes.values()) < 300_000
    assert min(s for n, s in sizes.items() if n != f"table-{len(sizes)}.html") > 150_000, "pages are not cut too early"
    assert max(p.stat().st_size for p in (out / "cells").iterdir()) < 300_000


def test_a_narrow_board_has_no_more_rows_to_a_page_than_promised(tmp_path: Path) -> None:
    cells = [synthetic.cell_row("badnets", 0.1, "ft", s, o_asr=0.1) for s in range(260)]
    out = build([synthetic.write_run(tmp_path / "r", cells, [])], tmp_path / "s").parent
    assert [len(board_rows(read(out / f))) for f in ("table.html", "table-2.html")] == [250, 10]
