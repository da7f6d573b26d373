"""The result tables: every column with its type, unit and meaning. Imports nothing heavy."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import pyarrow as pa

SCHEMA_VERSION = "1"
Type = Literal["str", "f64", "i64", "bool", "timestamp"]


@dataclass(frozen=True)
class Column:
    """One column of a table. `volatile` columns may differ between two runs of the same suite."""

    name: str
    type: Type
    doc: str
    unit: str = ""
    volatile: bool = False


JUDGES = ("detection", "inversion", "cleansing")
"""INFO kinds of defenses that answer about a model, its trigger or its training rows and leave the model as it is."""
STATUSES = ("ok", "not_applicable", "failed", "timeout", "out_of_memory", "not_run")
FLAGS = ("weak", "collapsed", "snapshot", "reduced", "stale", "nondeterministic", "tuned")

_IDENTITY = (
    Column("suite", "str", "Suite that asked for the figure"),
    Column("protocol", "str", "Version of the measuring protocol"),
    Column("dataset", "str", "Data set"),
    Column("data_digest", "str", "sha256 of the rows that were used; ends in `!` when they differ from the release"),
    Column("arch", "str", "Architecture"),
    Column("attack", "str", "Attack, with `~` and a digest when its parameters are not the suite's first"),
    Column("attack_params", "str", "Parameters of the attack, canonical JSON"),
    Column("rate", "f64", "Poison rate asked for: share of the rows trained on", "fraction"),
    Column(
        "rate_actual",
        "f64",
        "Dirty rows per row that was not appended; where training itself poisons, triggered rows per row drawn",
        "fraction",
    ),
    Column("defense", "str", "Defense, with `~` and a digest when its parameters are not the suite's first"),
    Column("defense_params", "str", "Parameters of the defense, canonical JSON"),
    Column("clean_source", "str", "Where the defender's clean rows come from: heldout or training"),
    Column("access", "str", "Access class of the defense: T0 T1 T2 T3 T4 Q none, with R for supplied clean models"),
    Column("seed", "i64", "Seed of the row"),
    Column("cell", "str", "dataset/arch/attack@rate/defense/s<seed>"),
)

MEASUREMENTS = (
    *_IDENTITY,
    Column("scope", "str", "What the figure belongs to: attack, cell or zoo"),
    Column("stage", "str", "Model that was measured: attacked, defended or reactivated"),
    Column("evaluator", "str", "Evaluator that measured it"),
    Column("metric", "str", "Metric"),
    Column("qualifier", "str", "`k=v` pairs joined by `;` that tell variants of a metric apart"),
    Column("value", "f64", "The figure; null unless status is ok"),
    Column("count", "i64", "For shares: successes"),
    Column("total", "i64", "For shares: trials"),
    Column("lower", "f64", "Lower end of the 95 % Wilson interval over this model's test images"),
    Column("upper", "f64", "Upper end of the 95 % Wilson interval over this model's test images"),
    Column("status", "str", "One of: " + " ".join(STATUSES)),
    Column("reason", "str", "Why there is no figure: snake_case word, then optional `: detail`"),
    Column("flag", "str", "`;`-joined, of: " + " ".join(FLAGS)),
    Column("seconds", "f64", "Wall time of the task; in rows of evaluator `cost` the defense's", "s", volatile=True),
    Column("cpu_seconds", "f64", "Processor time, likewise", "s", volatile=True),
    Column("peak_mb", "f64", "Largest resident memory of the process, likewise", "MB", volatile=True),
    Column("forwards", "i64", "Images through a forward pass, likewise", "images"),
    Column("backwards", "i64", "Images through a backward pass, likewise", "images"),
    Column("queries", "i64", "Images sent to a query-only model, likewise", "images"),
    Column("device", "str", "Device that computed it", volatile=True),
    Column("threads", "i64", "Threads per task"),
    Column("precision", "str", "Precision of training"),
    Column("method_version", "i64", "Version of the evaluator"),
    Column("dist", "str", "Distribution that the evaluator comes from"),
    Column("dist_version", "str", "Version of that distribution"),
    Column("env", "str", "Versions of the libraries, JSON", volatile=True),
    Column("attack_key", "str", "Key of the attack's artifact"),
    Column("defense_key", "str", "Key of the defense's artifact"),
    Column("task_key", "str", "Key of the task that measured it"),
    Column("started", "timestamp", "When the task started, UTC", volatile=True),
)

_HEADLINES = {
    "c_acc": "Accuracy on clean test images",
    "asr": "Attack success rate: triggered test images of other classes that get the attacker's label",
    "r_acc": "Robust accuracy: triggered test images that get their true label",
    "c_acc_attacked": "c_acc of the undefended model",
    "asr_attacked": "asr of the undefended model",
    "o_asr": "Original ASR: asr of this cell's model before any re-activation",
    "p_asr": "Post-purification ASR: the worse of p_asr_ra and p_asr_qra",
    "p_asr_net": "p_asr_ra and p_asr_qra, each minus the largest of its three controls without this backdoor, floored "
    "at 0: the larger",
    "p_asr_ra": "ASR after the retuning attack, mean over draws",
    "p_asr_qra": "ASR under the query-based reactivation attack",
    "c_acc_ra": "c_acc after the retuning attack, mean over draws",
    "p_asr_set": "str",
    "asr_wba": "ASR under the white-box re-activation attack",
    "asr_bba": "ASR under the black-box re-activation attack",
    "asr_tba": "ASR under the transfer re-activation attack",
    "bec": "Backdoor existence coefficient",
    "reasr": "Attack success of the recovered trigger",
    "reasr_clean": "The same recovered trigger on clean models",
    "apd": "Average pixel difference between recovered and true trigger",
    "apd_rel": "apd relative to an empty answer",
    "excl": "Backdoor exclusivity",
    "der": "Defense effectiveness rating",
    "p_der": "Defense effectiveness rating with the larger of o_asr and net p_asr in place of asr",
    "det_score": "Score of the model-level verdict",
}

CELLS = (
    *_IDENTITY,
    *(
        Column(n, "str", "Which probes p_asr is the worse of")
        if n == "p_asr_set"
        else Column(n, "f64", d, "" if n in ("bec", "apd", "apd_rel", "det_score", "excl") else "fraction")
        for n, d in _HEADLINES.items()
    ),
    Column("verdict", "bool", "Flagged as backdoored"),
    Column("status", "str", "One of: " + " ".join(STATUSES)),
    Column("reason", "str", "Why the cell has no figures"),
    Column("flag", "str", "`;`-joined, of: " + " ".join(FLAGS)),
    Column("reasons", "str", "JSON: metric -> reason of each null"),
    Column(
        "seconds",
        "f64",
        "Wall time of all that was measured, with the defense if `cost` is among it",
        "s",
        volatile=True,
    ),
    Column("method_version", "i64", "Version of the defense"),
    Column("attack_key", "str", "Key of the attack's artifact"),
    Column("defense_key", "str", "Key of the defense's artifact"),
)

HEADLINE_METRICS = tuple(n for n in _HEADLINES if n != "p_asr_set")
KEY = ("task_key", "evaluator", "metric", "qualifier")
LOW_RATE = 0.01
"""Up to this poison rate the lower bar counts."""
ALL_TO_ALL_SHARE = 0.95
"""Of the C-Acc of clean models: the ASR at which an all-to-all attack counts as implanted."""
VOLATILE = frozenset(c.name for c in (*MEASUREMENTS, *CELLS) if c.volatile)


def arrow(columns: tuple[Column, ...]) -> pa.Schema:
    """The pyarrow schema of a table, with `doc` and `unit` per column and the schema version."""
    import pyarrow as pa

    types = {
        "str": pa.string(),
        "f64": pa.float64(),
        "i64": pa.int64(),
        "bool": pa.bool_(),
        "timestamp": pa.timestamp("us", tz="UTC"),
    }
    fields = [pa.field(c.name, types[c.type], metadata={"doc": c.doc, "unit": c.unit}) for c in columns]
    return pa.schema(fields, metadata={"sleeperbench.schema": SCHEMA_VERSION})


def reproduce(cell: Mapping[str, Any], suite: str) -> list[str]:
    """The arguments of `sleeperbench` that compute a cell again, also one that flags or --set added to its suite.

    Args:
        cell: Its row of cells.parquet.
        suite: Name of a shipped suite, or path of a suite file.
    """
    argv = ["run", suite, "--dataset", cell["dataset"], "--arch", cell["arch"]]
    for kind in ("attack", "defense"):
        plugin, changed, _ = cell[kind].partition("~")
        argv += [f"--{kind}", plugin]
        if changed:
            argv += [part for s in _settings(kind, plugin, json.loads(cell[f"{kind}_params"])) for part in ("--set", s)]
    if cell["rate"]:
        argv += ["--rate", f"{cell['rate']:g}"]
    return [*argv, "--seeds", str(cell["seed"])]


def implant_bar(
    infos: Iterable[Mapping[str, Any]],
    params: Mapping[str, Any],
    rate: float,
    gate: Mapping[str, Any],
    clean: float | None = None,
) -> float:
    """The mean ASR from which an attack counts as implanted: the lowest of the bars that hold for it.

    These are the protocol's, the attack's own, and for `targets = "all_to_all"` 0.95 of the C-Acc of clean models:
    there a hit takes the true class and one step on, so that ASR hardly exceeds C-Acc.

    Args:
        infos: INFO of the attack, with those of its wrappers. `clean_label` says that labels stay true, `implant_asr`
            is the attack's own bar.
        params: Its parameters; `labels = "clean"` says that labels stay true as well.
        rate: Poison rate.
        gate: The suite's bars: `implant_asr`, and `implant_asr_low` for clean labels and rates of up to 1 %.
        clean: Mean C-Acc of clean models; None where there are none.
    """
    told, levels = list(infos), list(_levels(params))
    low = rate <= LOW_RATE or any(i.get("clean_label") for i in told) or any(p.get("labels") == "clean" for p in levels)
    bars = [gate["implant_asr_low" if low else "implant_asr"]]
    bars += [info["implant_asr"] for info in told if isinstance(info.get("implant_asr"), float | int)]
    if clean is not None and any(p.get("targets") == "all_to_all" for p in levels):
        bars.append(ALL_TO_ALL_SHARE * clean)
    return float(min(bars))


def _levels(params: Any) -> Iterator[Mapping[str, Any]]:
    """Parameters of an attack, then of what it wraps."""
    while isinstance(params, Mapping):
        yield params
        params = params.get("inner")


def _settings(kind: str, plugin: str, params: Mapping[str, Any]) -> list[str]:
    """KIND.ID.KEY=VALUE of every parameter; a wrapped plugin's by `inner.KEY` where its wrapper has the name too."""
    flat: dict[str, Any] = {}
    level: Any = params
    prefix = ""
    while isinstance(level, Mapping):
        inner = level.get("inner") if ":" in plugin else None
        own = {k: v for k, v in level.items() if k != "inner" or not isinstance(inner, Mapping)}
        for k, v in own.items():
            # Always the prefix if a level between has the name, since that level would take it.
            flat[prefix + k if k in flat else k] = v
        level, prefix = inner, prefix + "inner."
    return [f"{kind}.{plugin}.{k}={json.dumps(v)}" for k, v in sorted(flat.items()) if v is not None]
