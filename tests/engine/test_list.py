from __future__ import annotations

import argparse
import json
import subprocess
import sys

import pytest
from plugins import GENTLE, install

from sleeperbench.cli import list as listing
from sleeperbench.errors import BadInput

COLUMNS = ("kind", "id", "dist", "dist_version", "method_version", "api", "status", "reason", "title", "paper")
KEYS = [*COLUMNS, "access", "wrapper"]
DEFENSES = "sleeperbench.defenses"


@pytest.fixture
def run(capsys, monkeypatch):
    monkeypatch.delenv("SLEEPERBENCH_PLUGINS", raising=False)

    def run(*words: str) -> str:
        parser = argparse.ArgumentParser()
        listing.add_parser(parser.add_subparsers())
        assert listing.main(parser.parse_args(["list", *words])) == 0
        return capsys.readouterr().out

    return run


def test_json_rows(run, tmp_path, monkeypatch):
    points = {DEFENSES: {"gentle": "list_gentle:Gentle", "wrap": "list_wrap:Gentle", "gone": "list_gone:Gentle"}}
    modules = {
        "list_gentle.py": GENTLE.replace('"paper": ""', '"paper": "https://example.org"')
        + "\nimport sys; sys.exit(3)\n",
        "list_wrap.py": GENTLE.replace('"micro"', '"wrapper": True, "micro"').replace('"api": 1', '"api": 7'),
    }
    monkeypatch.syspath_prepend(install(tmp_path, "outside", "2.5", modules, points))
    rows = json.loads(run("--json", "defenses"))
    assert all(list(r) == KEYS and r["kind"] == "defense" for r in rows)
    by_id = {r["id"]: r for r in rows}
    assert by_id["outside/gentle"] == dict(
        zip(
            KEYS,
            [
                "defense",
                "outside/gentle",
                "outside",
                "2.5",
                1,
                1,
                "ok",
                "",
                "Gentle",
                "https://example.org",
                "T1",
                False,
            ],
            strict=True,
        )
    )
    wrap = by_id["outside/wrap:"]
    assert (wrap["status"], wrap["api"], wrap["wrapper"]) == ("incompatible", 7, True)
    gone = by_id["outside/gone"]
    assert (gone["status"], gone["title"], gone["method_version"]) == ("broken", "", None)
    assert "list_gone" in gone["reason"]
    assert (by_id["ft"]["dist"], by_id["ft"]["access"]) == ("sleeperbench", "T1")


def test_a_table_with_aligned_columns_and_the_broken_below(run, tmp_path, monkeypatch):
    source = GENTLE.replace('"Gentle"', '"A\\x1b[31m long\\ntitle ' + "x" * 60 + '"')
    points = {DEFENSES: {"gentle": "list_gentle:Gentle", "gone": "list_gone:Gentle"}}
    monkeypatch.syspath_prepend(install(tmp_path, "outside", "2.5", {"list_gentle.py": source}, points))
    out = run("defenses")
    assert "\x1b" not in out
    table, _, footer = out.partition("not usable:\n")
    heading, header, *lines = table.rstrip().splitlines()
    assert heading == f"defenses ({len(lines)})"
    assert header.split() == ["id", "title", "access", "version", "dist", "status"]
    for line in lines:
        assert line[header.index("status") :] in ("ok", "broken")
        assert line[header.index("dist") :].startswith(("sleeperbench ", "outside 2.5"))
    assert any("..." in line for line in lines)
    assert footer.strip().splitlines() == [
        "defense outside/gone (outside 2.5): "
        "there is no module `list_gone`: correct the entry point, or install its package again"
    ]


def test_every_kind_and_only_that(run):
    for what, kind in listing.KINDS.items():
        assert {r["kind"] for r in json.loads(run(what, "--json"))} <= {kind}
        assert run(what).startswith(f"{what} (")
    headings = [line.split()[0] for line in run().splitlines() if line and line[0] != " "]
    assert headings[:6] == list(listing.KINDS)


def test_suites(run, tmp_path, monkeypatch):
    (tmp_path / "a.toml").write_text('# A first line\nname = "a"\n')
    (tmp_path / "b.toml").write_text('# not this\ntitle = "The second"\n')
    (tmp_path / "c.toml").write_text("name = \n")
    (tmp_path / "d.txt").write_text("")
    monkeypatch.setattr(listing.resources, "files", lambda package: tmp_path)
    rows = json.loads(run("suites", "--json"))
    assert [(r["id"], r["title"], r["status"]) for r in rows] == [
        ("a", "A first line", "ok"),
        ("b", "The second", "ok"),
        ("c", "", "broken"),
    ]
    assert list(rows[0]) == KEYS
    assert "c.toml: Invalid value" in rows[2]["reason"]


def test_a_name_that_is_neither_kind_nor_method(run):
    with pytest.raises(BadInput, match="did you mean `defenses`"):
        run("defences")
    with pytest.raises(BadInput, match="`pam`"):
        run("pamm")


def test_a_method_with_its_parameters_and_presets(run):
    told = json.loads(run("ct", "--json"))[0]
    assert list(told) == [*KEYS, "parameters", "presets"]
    assert told["parameters"]["steps"]["default"] == 6000
    head, *lines = run("ct").splitlines()
    assert head.startswith("defense ct: ") and "T3" in head
    assert [line.split()[0] for line in lines[:-1]] == list(told["parameters"])
    wanted = ", ".join(f"{k} = {v}" for k, v in told["presets"]["reduced"].items())
    assert lines[-1] == f"  preset reduced: {wanted}"
    # One line per kind that has the id.
    assert [line.split()[0] for line in run("none").splitlines() if line[0] != " "] == ["attack", "defense"]


def test_nothing_heavy_is_imported(tmp_path):
    code = (
        "import argparse, sys; from sleeperbench.cli import list as l\n"
        "p = argparse.ArgumentParser(); l.add_parser(p.add_subparsers()); l.main(p.parse_args(['list', '--json']))\n"
        "heavy = {'torch', 'torchvision', 'timm', 'pandas', 'matplotlib', 'numpy', 'pyarrow', 'sklearn', 'jinja2'}\n"
        "methods = {'sleeperbench.attacks', 'sleeperbench.defenses', 'sleeperbench.evaluators', 'sleeperbench.kit'}\n"
        "print(sorted((heavy | methods) & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"
    assert {r["kind"] for r in json.loads(done.stdout)} >= {"attack", "defense", "evaluator", "dataset", "model"}
