from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import synthetic

from sleeperbench.cli import site
from sleeperbench.errors import BadInput


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    site.add_parser(parser.add_subparsers(dest="command"))
    return parser.parse_args(["site", *words])


def test_the_last_line_names_the_index(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = synthetic.write_run(tmp_path / "a", *synthetic.tables(1, ["badnets"], ["none"], 1))
    b = synthetic.write_run(tmp_path / "b", *synthetic.tables(1, ["sig"], ["none"], 1))
    assert site.main(parse("--results", str(a), str(b), "--out", str(tmp_path / "s"))) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"site: {tmp_path / 's' / 'index.html'}"
    assert (tmp_path / "s" / "attacks" / "sig.html").is_file()
    assert (tmp_path / "s" / "attacks" / "badnets.html").is_file()


def test_a_folder_without_tables_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"no cells.parquet") as e:
        site.main(parse("--results", str(tmp_path), "--out", str(tmp_path / "s")))
    assert e.value.exit_code == 2
    assert not (tmp_path / "s").exists()


def test_an_out_that_is_a_file_is_bad_input(tmp_path: Path) -> None:
    run = synthetic.write_run(tmp_path / "a", *synthetic.tables(1, ["badnets"], ["none"], 1))
    (tmp_path / "s").write_text("")
    with pytest.raises(BadInput, match="cannot write the site to"):
        site.main(parse("--results", str(run), "--out", str(tmp_path / "s")))


@pytest.mark.parametrize("words", [["--out", "x"], ["--results", "x"], ["--results", "--out", "x"]])
def test_both_options_are_required(words: list[str]) -> None:
    with pytest.raises(SystemExit):
        parse(*words)
