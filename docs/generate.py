"""Writes the generated parts of the documentation: of README.md and docs/suites.md, docs/tables.md, cli.md, judges.md.

`python docs/generate.py` renews them; with --check it only compares, and exits 4 when something differs.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tomllib
from contextlib import redirect_stdout, suppress
from pathlib import Path

from sleeperbench import schema
from sleeperbench.cli import COMMANDS, parser
from sleeperbench.contracts.access import Access
from sleeperbench.engine import suite
from sleeperbench.engine.registry import Registry

ROOT = Path(__file__).resolve().parent.parent
END = "<!-- end -->"
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


ANSWERS = {"cleansing": "training rows", "inversion": "the model, with a trigger"}
"""What defenses of a kind answer about; of detection, inputs where there is a second phase, else the model.

A detector of inputs that is given the training set answers about its rows, and so about the model, as well.
"""


def judges() -> str:
    """What defenses that judge need, whether they traverse classes, and what they presume, from ACCESS and INFO."""
    text = [
        "# Judges",
        "",
        "Generated from ACCESS and INFO. What every defense that judges models, inputs or training rows is given,",
        "whether it looks at each class in turn as a possible target, and what it takes for granted of the trigger (as",
        "Table I of [IsTr](methods/istr.md) compares methods). None need find an attack outside of what it presumes.",
        "",
        "| method | answers about | access | traverses classes | presumes |",
        "|---|---|---|---|---|",
    ]
    found = [p for p in Registry.discover("none").of("defense") if p.blueprint.info["kind"] in schema.JUDGES]
    for p in found:
        info, access = p.blueprint.info, p.blueprint.access
        about = ANSWERS.get(info["kind"]) or ("inputs" if info.get("scores") else "the model")
        if about == "inputs" and access and access.train:
            about = "inputs, training rows, the model"
        name = f"[`{p.id}`](methods/{p.id}.md)" if (ROOT / f"docs/methods/{p.id}.md").exists() else f"`{p.id}`"
        seen = _words(access) if access else ""
        crossed = "yes" if info["traverses"] else "no"
        text.append(f"| {name} | {about} | {seen} | {crossed} | {info['presumes']} |")
    return "\n".join(text) + "\n"


def _words(access: Access) -> str:
    """ACCESS in words, with its class."""
    model = {"none": "", "labels": "its labels", "scores": "its scores", "weights": "weights"}[access.model]
    clean = f"{100 * access.clean:g} % clean rows" if isinstance(access.clean, float) else f"{access.clean} clean rows"
    parts = [model, clean if access.clean else "", "training set" if access.train else ""]
    parts += ["clean models" if access.references else "", "the true backdoor" if access.oracle else ""]
    return ", ".join(p for p in parts if p) + f" ({access.track()})"


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
    return "\n".join(text) + "\n"


MEANINGS = {
    "matrix.datasets": "Data sets; those of your own count too, see [data.md](data.md)",
    "matrix.archs": "Architectures, see [models.md](models.md)",
    "matrix.attacks": "Attacks; `none` trains clean models, which most columns are held against",
    "matrix.rates": "Poison rates, shares of the training rows; `[attack.ID] rates` gives an attack its own",
    "matrix.defenses": "Defenses; `none` is added where it is missing",
    "matrix.evaluators": "What is measured of every cell",
    "matrix.seeds": "Everything is done once per seed; the first one also calibrates `ra_budget`",
    "train.recipe": "Recipe for what is not given: `s3`, the superficial-safety paper's; `bb`, BackdoorBench's",
    "train.epochs": "Passes over the training rows",
    "train.lr": "Learning rate of SGD",
    "train.batch": "Rows per step",
    "train.momentum": "Momentum of SGD",
    "train.weight_decay": "Weight decay",
    "train.schedule": "What becomes of the learning rate",
    "train.precision": "`bf16` runs under autocast",
    "train.pad": "Pixels of padding before the random crop; the data set's own unless given",
    "train.flip": "Whether images are mirrored at random; the data set's own unless given",
    "train.curves": "Whether losses and accuracies per epoch are kept",
    "train.poisoned": "`append` keeps the clean copy of every poisoned row, see [training.md](training.md)",
    "train.inject": "`finetune` tunes the backdoor into a clean model, see [training.md](training.md)",
    "train.inject_epochs": "Passes of that; `epochs` unless given",
    "train.inject_lr": "Learning rate of that; 0.01 unless given",
    "access.clean": "The defender's clean rows: a share of the training rows below 1, or a number",
    "access.clean_source": "`heldout`: cut off before anything is trained; `training`: benign rows that are trained on",
    "budget.threads": "Threads per task",
    "budget.task_seconds": "Seconds after which a task ends as `timeout`",
    "budget.memory_gb": "Memory that a task on a processor may allocate",
    "gate.implant_asr": "Mean ASR from which an attack counts as implanted, unless it declares a lower one; all to all "
    "also from 0.95 of clean C-Acc",
    "gate.implant_asr_low": "The same for clean labels and for rates of up to 1 %",
    "gate.collapse_points": "C-Acc lost from which a defense counts as collapsed",
    "gate.clean_drop_points": "C-Acc lost against clean models up to which an attack counts as implanted",
}


def suites() -> str:
    """The keys of a suite file with their defaults and ranges, and the suites of the package."""
    text = ["| key | default | may be | meaning |", "|---|---|---|---|"]
    for table, keys in suite.TABLES.items():
        for key in keys:
            default = suite.DEFAULTS.get(table, {}).get(key)
            told = "" if default is None else f"`{json.dumps(default)}`"
            low, high = suite.RANGES.get((table, key), (None, None))
            allowed = ", ".join(f"`{c}`" for c in suite.CHOICES.get((table, key), ()))
            allowed = allowed or ("" if low is None else f"{low:g} to {high:g}")
            text.append(f"| `{table}.{key}` | {told} | {allowed} | {MEANINGS[f'{table}.{key}']} |")
    text += ["", "## Shipped", "", "| suite | what |", "|---|---|"]
    text += [f"| `{n}` | {tomllib.loads(t).get('title', '')} |" for n, t in suite.shipped().items()]
    return "\n".join(text)


def within(file: str, what: str, text: str) -> str:
    """The file with the part between its marks replaced."""
    begin = f"<!-- generated: {what} -->"
    before, _, rest = (ROOT / file).read_text().partition(begin)
    return f"{before}{begin}\n{text}\n{END}{rest.partition(END)[2]}"


def main() -> int:
    """Renew or compare."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--check", action="store_true", help="compare only")
    args = p.parse_args()
    wanted = {
        "README.md": within("README.md", "methods", methods()),
        "docs/tables.md": tables(),
        "docs/cli.md": commands(),
        "docs/suites.md": within("docs/suites.md", "suites", suites()),
        "docs/judges.md": judges(),
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
