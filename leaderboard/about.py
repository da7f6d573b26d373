"""What plugins.json says: titles, papers, parameters, and the units and meanings of metrics."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from sleeperbench.leaderboard import terms, words
from sleeperbench.leaderboard.names import linked
from sleeperbench.schema import HEADLINE_METRICS

BIBTEX = "@misc{sleeperbench,\n  title = {SleeperBench: is the backdoor gone, or only asleep?},\n  year = {2025}\n}"
"""How to cite the benchmark."""
Plugins = Mapping[tuple[str, str], Mapping[str, Any]]
"""(kind, id) -> its entry."""


def known(entry: Mapping[str, Any], key: str) -> Any:
    """A field of a plugin's entry, or of the INFO within it; empty where neither has it."""
    info = entry.get("info")
    return entry.get(key) or (info.get(key) if isinstance(info, dict) else None) or ""


def params(text: str, docs: Mapping[str, str] = MappingProxyType({})) -> list[tuple[str, str, str]]:
    """Parameters as (name, value, meaning) of a canonical JSON object, or whatever else stands there."""
    try:
        raw = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return [("as recorded", text, "")]
    if not isinstance(raw, dict):
        return [("as recorded", text, "")]
    shown = {str(k): v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in raw.items()}
    return [(k, v, docs.get(k, "")) for k, v in sorted(shown.items())]


def declared(plugins: Plugins) -> tuple[dict[str, str], dict[str, str]]:
    """Units and meanings of the metrics that evaluators declare in plugins.json; the schema's win."""
    units, docs = {}, {}
    better = {"up": " Higher is better.", "down": " Lower is better."}
    for (kind, _), entry in plugins.items():
        listed = entry.get("metrics") if kind == "evaluator" else None
        for m in listed if isinstance(listed, list) else []:
            if isinstance(m, dict) and isinstance(m.get("name"), str):
                units[m["name"]] = str(m.get("unit", ""))
                docs[m["name"]] = str(m.get("doc", "")) + "." + better.get(str(m.get("better")), "")
    headline = {m: words.COLUMNS[m] for m in HEADLINE_METRICS}
    units |= {m: "fraction" if words.is_share(m, {}) else c.unit for m, c in headline.items()}
    docs |= {m: f"{c.doc}. {terms.BETTER.get(m, '')}".strip() for m, c in headline.items()}
    return units, docs | {m: f"{docs.get(m, '')} {text}".strip() for m, text in terms.READING.items()}


def plugin(plugins: Plugins, kind: str, name: str) -> dict[str, Any]:
    """What plugins.json says of a plugin; of a wrapped one, what it says of both."""
    found = [e for part in dict.fromkeys((name, *name.split(":"))) if (e := plugins.get((kind, part)))]
    entry = found[0] if found else {}
    text = {k: str(known(entry, k)) for k in ("dist", "dist_version")}
    info = entry.get("info")
    text["kind"] = str(info.get("kind", "")) if isinstance(info, dict) else ""
    titles = [str(known(e, "title")) for e in found]
    if len(titles) == 1 and ":" in name:
        titles.append(name.partition(":")[2])
    infos = [e["info"] for e in found if isinstance(e.get("info"), dict)]
    first, _, rest = str(known(entry, "doc")).strip().partition("\n\n")
    fields = [e["parameters"] for e in found if isinstance(e.get("parameters"), dict)]
    return {
        **text,
        "title": " of ".join(t for t in dict.fromkeys(titles) if t),
        # A wrapper says nothing of its own: it presumes what the method that it wraps does.
        "traverses": next((i["traverses"] for i in infos if isinstance(i.get("traverses"), bool)), None),
        "presumes": next((i["presumes"] for i in infos if isinstance(i.get("presumes"), str)), ""),
        "version": str(known(entry, "method_version") or known(entry, "version")),
        "doc": first,
        "more": textwrap.dedent(rest),
        "papers": [linked(t) for t in dict.fromkeys(str(known(e, "paper")) for e in found) if t],
        "bibtex": "\n\n".join(dict.fromkeys(t for e in found if (t := str(known(e, "bibtex")).strip()))),
        "fields": {str(k): str(f.get("doc", "")) for p in fields for k, f in p.items() if isinstance(f, dict)},
    }
