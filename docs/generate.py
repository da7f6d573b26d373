"""Writes the generated parts of the documentation: the table of methods in README.md, docs/tables.md, docs/cli.md.

`python docs/generate.py` renews them; with --check it only compares, and exits 4 when something differs.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import tomllib
from contextlib import redirect_stdout, suppress
from pathlib import Path

from sleeperbench import schema
from sleeperbench.cli import COMMANDS, parser
from sleeperbench.engine.registry import Registry
from sleeperbench.engine.suite import shipped

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- generated: methods -->", "<!-- end -->"
KINDS = (("attack", "Attacks"), ("defense", "Defenses"), ("evaluator", "Evaluators"))


def methods() -> str:
    """Tables of the built-in methods, from their INFO."""
    registry = Registry.discover("none")
    parts = []
    for kind, title in KINDS:
        rows = []
        for p in registry.of(kind):  # type: ignore[arg-type]
            b = p.blueprint
            access = b.access.track() if kind == "defense" and b.access and p.id != "none" else ""
            page = f"docs/methods/{p.id}.md"
            name = f"[`{p.id}`]({page})" if (ROOT / page).exists() else f"`{p.id}`"
            paper = f"[paper]({b.info['paper']})" if b.info.get("paper") else ""
            cells = [name, b.doc.rstrip("."), *([access] if kind == "defense" else []), paper]
            rows.append("| " + " | ".join(cells) + " |")
        head = ["id", "what it does", *(["access"] if kind == "defense" else []), "source"]
        parts.append("\n".join([f"**{title}**", "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|", *rows]))
    return "\n\n".join(parts)


def tables() -> str:
    """The columns of the result tables, from the schema."""
    text = [
        "# Result tables",
        "",
        "Generated from `sleeperbench.schema`. Volatile columns may differ between two runs.",
    ]
    for name, columns in (("measurements.parquet", schema.MEASUREMENTS), ("cells.parquet", schema.CELLS)):
        text += ["", f"## {name}", "", "| column | type | unit | volatile | meaning |", "|---|---|---|---|---|"]
        for c in columns:
            doc = c.doc.replace("|", "\\|")
            text.append(f"| `{c.name}` | {c.type} | {c.unit} | {'yes' if c.volatile else ''} | {doc} |")
    return "\n".join(text) + "\n"


def commands() -> str:
    """`--help` of every command."""
    os.environ["COLUMNS"] = "100"  # argparse wraps to the terminal otherwise
    text = ["# Commands", "", "Generated from `--help`."]
    for name in COMMANDS:
        out = io.StringIO()
        with redirect_stdout(out), suppress(SystemExit):
            parser().parse_args([name, "--help"])
        text += ["", f"## {name}", "", "```", out.getvalue().rstrip(), "```"]
    text += ["", "## Suites", "", "| suite | what |", "|---|---|"]
    text += [f"| `{n}` | {tomllib.loads(t).get('title', '')} |" for n, t in shipped().items()]
    return "\n".join(text) + "\n"


def main() -> int:
    """Renew or compare."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--check", action="store_true", help="compare only")
    args = p.parse_args()
    readme = (ROOT / "README.md").read_text()
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    wanted = {
        "README.md": f"{before}{BEGIN}\n{methods()}\n{END}{after}",
        "docs/tables.md": tables(),
        "docs/cli.md": commands(),
    }
    stale = [n for n, text in wanted.items() if not (ROOT / n).exists() or (ROOT / n).read_text() != text]
    for name in stale:
        if args.check:
            print(f"{name} is not what `make docs` writes; run it and commit the result", file=sys.stderr)
        else:
            (ROOT / name).write_text(wanted[name])
            print(f"wrote {name}")
    return 4 if args.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
