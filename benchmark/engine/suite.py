"""Suites: TOML in, everything resolved and checked out. An unknown key is an error that names the nearest one."""

from __future__ import annotations

import copy
import itertools
import json
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, cast

from sleeperbench.engine.plugin import Plugin
from sleeperbench.engine.registry import Kind, Registry
from sleeperbench.engine.task import PUBLIC_SECRET, digest
from sleeperbench.errors import BadInput, nearest

SCHEMA = 1
METHODS: tuple[Kind, ...] = ("attack", "defense", "evaluator")
RECIPES: dict[str, dict[str, Any]] = {
    "s3": {"epochs": 100, "lr": 0.1, "batch": 128, "momentum": 0.9, "weight_decay": 5e-4, "schedule": "cosine"},
    "bb": {"epochs": 100, "lr": 0.01, "batch": 128, "momentum": 0.9, "weight_decay": 5e-4, "schedule": "cosine"},
}
"""Published training recipes: `s3` of the superficial-safety paper, `bb` of BackdoorBench."""

INJECT_LR = 0.01
"""Learning rate at which a backdoor is tuned into a clean model: that of fine-tuning, a tenth of recipe `s3`'s."""
TABLES: dict[str, dict[str, tuple[type, ...]]] = {
    "matrix": {
        "datasets": (list,),
        "archs": (list,),
        "attacks": (list,),
        "rates": (list,),
        "defenses": (list,),
        "evaluators": (list,),
        "seeds": (list,),
    },
    "train": {
        "recipe": (str,),
        "epochs": (int,),
        "lr": (float, int),
        "batch": (int,),
        "momentum": (float, int),
        "weight_decay": (float, int),
        "schedule": (str,),
        "precision": (str,),
        "pad": (int,),
        "flip": (bool,),
        "curves": (bool,),
        "poisoned": (str,),
        "inject": (str,),
        "inject_epochs": (int,),
        "inject_lr": (float, int),
    },
    "access": {"clean": (float, int), "clean_source": (str,)},
    "budget": {"threads": (int,), "task_seconds": (int, float), "memory_gb": (int, float)},
    "gate": {
        "implant_asr": (float, int),
        "implant_asr_low": (float, int),
        "collapse_points": (float, int),
        "clean_drop_points": (float, int),
    },
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "matrix": {"rates": [0.05], "evaluators": ["accuracy"], "seeds": [0]},
    "train": {"recipe": "s3", "precision": "fp32", "curves": False, "poisoned": "replace", "inject": "scratch"},
    "access": {"clean": 0.05, "clean_source": "heldout"},
    "budget": {"threads": 1, "task_seconds": 7200, "memory_gb": 4},
    "gate": {"implant_asr": 0.9, "implant_asr_low": 0.7, "collapse_points": 10, "clean_drop_points": 2},
}
_PLUGIN_TABLES = ("attack", "defense", "evaluator", "dataset", "model")
_DATASET_KEYS = {"train": (int,), "test": (int,)}
_INNER = "inner."
"""Before the name of a wrapped plugin's parameter, where the wrapper has one of that name too."""
_PRESET = "preset"
"""The key of a plugin's table that names one of INFO's `presets`."""
_PUBLISHED = "published"
"""The name of no preset: `--set` takes one back that a suite names."""
CHOICES = {
    ("train", "schedule"): ("cosine", "constant"),
    ("train", "precision"): ("fp32", "bf16"),
    ("train", "recipe"): tuple(RECIPES),
    ("train", "poisoned"): ("replace", "append"),
    ("train", "inject"): ("scratch", "finetune"),
    ("access", "clean_source"): ("heldout", "training"),
}
RANGES: dict[tuple[str, str], tuple[float, float]] = {
    ("train", "epochs"): (1, 100_000),
    ("train", "lr"): (1e-9, 100),
    ("train", "batch"): (1, 1_000_000),
    ("train", "inject_epochs"): (1, 100_000),
    ("train", "inject_lr"): (1e-9, 100),
    ("train", "momentum"): (0, 1),
    ("train", "weight_decay"): (0, 1),
    ("train", "pad"): (0, 64),
    ("budget", "threads"): (1, 1024),
    ("budget", "task_seconds"): (0.1, 1e9),
    ("budget", "memory_gb"): (0.1, 1e6),
    ("gate", "implant_asr"): (0, 1),
    ("gate", "implant_asr_low"): (0, 1),
    ("gate", "collapse_points"): (0, 100),
    ("gate", "clean_drop_points"): (0, 100),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Variant:
    """A plugin with its full parameters; its `label` in rows carries a digest unless they are the suite's.

    Compared and hashed by identity, which lets the planner remember what it made of it.
    """

    id: str
    label: str
    params: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A resolved suite: nothing in it refers to a default any more."""

    name: str
    title: str
    secret: str
    datasets: tuple[str, ...]
    dataset_rows: dict[str, dict[str, int]]
    archs: tuple[str, ...]
    arch_args: dict[str, dict[str, Any]]
    attacks: tuple[Variant, ...]
    rates: tuple[float, ...]
    attack_rates: dict[str, tuple[float, ...]]
    """Attack -> rates of its own in place of the matrix's."""
    defenses: tuple[Variant, ...]
    evaluators: tuple[Variant, ...]
    seeds: tuple[int, ...]
    calibration_seed: int
    recipe: dict[str, Any]
    curves: bool
    append: bool
    """Whether poisoned rows stand beside their clean copies instead of in their place, whatever the attack does."""
    injection: dict[str, Any]
    """Empty where attacks train from scratch, else what of the recipe differs when a clean model is tuned further."""
    access: dict[str, Any]
    budget: dict[str, Any]
    gate: dict[str, Any]
    defaults: dict[str, dict[str, dict[str, Any]]]
    tuned: tuple[str, ...] = ()
    """`attack.badnets` and the like: plugins with a setting that was found by trying; their rows say so."""

    def default(self, kind: Kind, plugin: str, registry: Registry) -> Variant:
        """The suite's variant of a plugin that need not be in the matrix, such as a control."""
        params = self.defaults.get(kind, {}).get(plugin)
        return Variant(
            id=plugin, label=plugin, params=resolve(registry, kind, plugin, {}) if params is None else params
        )


@dataclass(frozen=True, kw_only=True)
class Changes:
    """What the command line changes. Lists restrict the matrix; a name that is not in it, but installed, is added."""

    attacks: Sequence[str] = ()
    defenses: Sequence[str] = ()
    evaluators: Sequence[str] = ()
    datasets: Sequence[str] = ()
    archs: Sequence[str] = ()
    rates: Sequence[float] = ()
    seeds: Sequence[int] = ()
    settings: Sequence[str] = ()
    timeout: float | None = None


def shipped() -> dict[str, str]:
    """Name -> TOML text of the suites in the package."""
    files = resources.files("sleeperbench.suites").iterdir()
    return {f.name[:-5]: f.read_text() for f in sorted(files, key=lambda f: f.name) if f.name.endswith(".toml")}


def read(name: str) -> tuple[dict[str, Any], str]:
    """The parsed TOML of a shipped suite or of a file, and its text.

    Raises:
        BadInput: no such suite or file, or not TOML.
    """
    if name.endswith(".toml"):
        try:
            text = Path(name).read_text(encoding="utf-8")
        except OSError as e:
            raise BadInput(
                f"cannot read the suite file {name}: {e.strerror}; correct the path, or name one of `list suites`"
            ) from e
        except UnicodeDecodeError as e:
            raise BadInput(f"the suite file {name} is not UTF-8 text: {e}; save it as UTF-8") from e
    else:
        suites = shipped()
        if name not in suites:
            raise BadInput(f"no suite `{name}`: {nearest(name, suites)} (a file's name ends in .toml)")
        text = suites[name]
    try:
        return tomllib.loads(text), text
    except tomllib.TOMLDecodeError as e:
        raise BadInput(f"suite {name} is not valid TOML: {e}") from e


def resolve(registry: Registry, kind: Kind, plugin: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """Full parameters of a plugin; a wrapper's hold the wrapped plugin's under `inner`.

    Args:
        registry: The plugins.
        kind: Theirs.
        plugin: Its id.
        params: What is given. A name that wrapper and wrapped plugin share is the wrapper's; `inner.NAME` is the
            wrapped one's in any case.
    """
    registry.chain(kind, plugin)
    wrapper, inner = Registry.split_wrapper(plugin)
    if wrapper is None:
        return dict(registry.get(kind, inner).blueprint.resolve(params))
    outer = registry.get(kind, wrapper)
    own = {k: v for k, v in params.items() if k in outer.blueprint.fields}
    rest: dict[str, Any] = {}
    for k, v in params.items():
        if k not in own:
            if (name := k.removeprefix(_INNER)) in rest:
                raise BadInput(f"[{kind}.{plugin}] {name} and {_INNER}{name} are one here; give one of them")
            rest[name] = v
    return {**outer.blueprint.resolve(own), "inner": resolve(registry, kind, inner, rest)}


def _shown(value: Any) -> str:
    """A value as TOML has it; dates and the like, which JSON lacks, as Python shows them."""
    return json.dumps(value, default=str)


def _typed(where: str, table: str, key: str, value: Any, types: tuple[type, ...]) -> Any:
    wrong_bool = isinstance(value, bool) and bool not in types
    if not isinstance(value, types) or wrong_bool:
        want = " or ".join(t.__name__ for t in types)
        raise BadInput(f"{where}: [{table}] {key} = {_shown(value)} is not {want}; correct it")
    if (table, key) in CHOICES and value not in CHOICES[table, key]:
        raise BadInput(f"{where}: [{table}] {key} = {_shown(value)}: {nearest(str(value), CHOICES[table, key])}")
    if (table, key) in RANGES:
        low, high = RANGES[table, key]
        if not low <= cast(float, value) <= high:
            raise BadInput(f"{where}: [{table}] {key} = {value} is outside {low:g} to {high:g}; correct it")
    return value


def _rates(where: str, name: str, values: Any) -> tuple[float, ...]:
    """Poison rates, looked at."""
    if not isinstance(values, list):
        raise BadInput(f"{where}: {name} = {_shown(values)}: give a list such as [0.05]")
    _items(where, name, values, float)
    for rate in values:
        if not 0 < rate <= 1:
            raise BadInput(f"{where}: poison rate {rate} is outside 0 (excluded) to 1; clean models are attack `none`")
    return tuple(float(r) for r in values)


def _own_rates(where: str, raw: Mapping[str, Any]) -> dict[str, tuple[float, ...]]:
    """Take `rates`, which is no parameter, out of the tables of attacks."""
    return {
        plugin: _rates(where, f"[attack.{plugin}] rates", params.pop("rates"))
        for plugin, params in _plugin_table(where, raw, "attack").items()
        if "rates" in params
    }


def _items(where: str, key: str, values: Sequence[Any], want: type) -> list[Any]:
    for v in values:
        if isinstance(v, bool) or not isinstance(v, (int, float) if want is float else want):
            raise BadInput(f"{where}: {key} holds {_shown(v)}, which is not {want.__name__}; correct it")
    if not values:
        raise BadInput(f"{where}: {key} is empty, so there is nothing to run; name at least one")
    # Cells show rates with six digits, so rates that agree in these would share a name.
    names = [f"{v:g}" if want is float else v for v in values]
    doubles = [n for i, n in enumerate(names) if n in names[:i]]
    if doubles:
        raise BadInput(f"{where}: {key} names {doubles[0]} twice; once is enough")
    return list(values)


def _set(raw: dict[str, Any], setting: str) -> None:
    """Apply one `--set KIND.ID.KEY=VALUE` (or TABLE.KEY=VALUE) to the parsed TOML."""
    name, eq, text = setting.partition("=")
    parts = name.split(".")
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        value = text
    if not eq or len(parts) < 2 or (parts[0] in _PLUGIN_TABLES and len(parts) < 3):
        raise BadInput(f"--set {setting}: write KIND.ID.KEY=VALUE, such as --set defense.ft.lr=0.02")
    if parts[0] in _PLUGIN_TABLES:
        key = parts.pop()
        while len(parts) > 2 and f"{parts[-1]}." == _INNER:
            key = f"{parts.pop()}.{key}"
        parts = [parts[0], ".".join(parts[1:]), key]
    table = raw
    for p in parts[:-1]:
        table = table.setdefault(p, {})
        if not isinstance(table, dict):
            raise BadInput(f"--set {setting}: `{p}` is no table; write KIND.ID.KEY=VALUE or TABLE.KEY=VALUE")
    table[parts[-1]] = value


def _pick(kind: str, have: list[Any], want: Sequence[Any], keep: Iterable[Any] = ()) -> list[Any]:
    """Restrict `have` to `want` (and what is always kept), then add what is new."""
    if not want:
        return have
    return [v for v in have if v in want or v in keep] + [v for v in want if v not in have]


def _flat(raw: Mapping[str, Any], before: str = "") -> Iterable[tuple[str, Any]]:
    """Keys and values; those of a table `inner` as `inner.KEY`."""
    for key, value in raw.items():
        if f"{key}." == _INNER and isinstance(value, Mapping):
            yield from _flat(value, before + _INNER)
        else:
            yield before + key, value


def _spellings(chain: Sequence[Plugin]) -> dict[str, tuple[int, str]]:
    """How a parameter of a plugin or of what it wraps may be written -> (place in the chain, its name).

    A name that several have is the outermost one's; each `inner.` before it passes one by.
    """
    return {
        _INNER * n + k: (depth, k)
        for depth, p in reversed(list(enumerate(chain)))
        for k in p.blueprint.fields
        for n in range(depth + 1)
    }


def _preset(registry: Registry, kind: Kind, plugin: str, flat: dict[str, Any]) -> dict[str, Any]:
    """Flat keys and values with those of the preset that they name; what stands beside it counts more.

    Of a wrapper and what it wraps, each that has a preset of this name takes its own.
    """
    chain = registry.chain(kind, plugin)
    if _PRESET not in flat or any(_PRESET in p.blueprint.fields for p in chain):
        return flat
    name = flat.pop(_PRESET)
    known = [n for p in chain for n in p.blueprint.info.get("presets", {})]
    if known and name == _PUBLISHED:
        return flat
    if name not in known:
        has = nearest(str(name), [*known, _PUBLISHED]) if known else "it has none"
        raise BadInput(f"[{kind}.{plugin}] preset = {_shown(name)}: {has}")
    whose = _spellings(chain)
    given = {whose.get(k) for k in flat}
    found = {
        _INNER * depth + k: v
        for depth, p in enumerate(chain)
        for k, v in p.blueprint.info.get("presets", {}).get(name, {}).items()
        if (depth, k) not in given
    }
    return found | flat


def _sweep(registry: Registry, kind: Kind, plugin: str, raw: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Parameter sets of a plugin: a list where the parameter is not one is swept."""
    chain = registry.chain(kind, plugin)
    fields = {name: chain[depth].blueprint.fields[k] for name, (depth, k) in _spellings(chain).items()}
    axes: list[list[tuple[str, Any]]] = []
    for key, value in _preset(registry, kind, plugin, dict(_flat(raw))).items():
        kinds = fields[key].annotation if key in fields else ""
        many = isinstance(value, list) and not any(t in kinds for t in ("tuple", "list", "Sequence"))
        if many and not value:
            raise BadInput(f"[{kind}.{plugin}] {key} = [] sweeps over nothing; give at least one value")
        if many and kind == "evaluator":
            raise BadInput(f"[{kind}.{plugin}] {key} = {_shown(value)}: an evaluator takes one value, not a sweep")
        axes.append([(key, v) for v in value] if many else [(key, value)])
    found = [resolve(registry, kind, plugin, dict(combo)) for combo in itertools.product(*axes)]
    for i, params in enumerate(found):
        if params in found[:i]:
            raise BadInput(f"[{kind}.{plugin}] sweeps over the same parameters twice; give each value once")
    return found


def _injection(where: str, train: dict[str, Any]) -> dict[str, Any]:
    """Take the keys of injection by fine-tuning out of [train]."""
    mode = train.pop("inject")
    given = {k.removeprefix("inject_"): train.pop(k) for k in ("inject_epochs", "inject_lr") if k in train}
    if mode == "scratch" and given:
        raise BadInput(f'{where}: [train] inject_{next(iter(given))} needs inject = "finetune"')
    return {} if mode == "scratch" else {"lr": INJECT_LR} | given


def _tuned(where: str, raw: Mapping[str, Any], defaults: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    """The suite's own word on which of its plugin tables hold a setting that was found by trying."""
    known = [f"{kind}.{plugin}" for kind, plugins in defaults.items() for plugin in plugins]
    names = raw.get("tuned", [])
    if not isinstance(names, list):
        raise BadInput(f'{where}: tuned = {_shown(names)}: give a list such as ["attack.badnets"]')
    for name in names:
        if name not in known:
            raise BadInput(f"{where}: tuned names {_shown(name)}, which has no table here: {nearest(str(name), known)}")
    return tuple(names)


def _plugin_table(where: str, raw: Mapping[str, Any], kind: str) -> dict[str, dict[str, Any]]:
    """The tables [kind.*] of a suite."""
    given = raw.get(kind, {})
    if not isinstance(given, dict):
        raise BadInput(f"{where}: `{kind}` must hold tables, [{kind}.ID]")
    for plugin, params in given.items():
        if not isinstance(params, dict):
            raise BadInput(f"{where}: `{kind}.{plugin}` must be a table of parameters, [{kind}.{plugin}]")
    return given


def _check_dataset(registry: Registry, name: str) -> None:
    """A data set is a plugin, or one that the user added, which the data package knows."""
    from sleeperbench.data.find import names

    if any(p.id == name for p in registry.of("dataset")) or name not in names():
        registry.get("dataset", name)


def build(name: str, registry: Registry, changes: Changes = Changes()) -> tuple[Suite, str]:
    """Resolve a suite; returns it with its TOML text.

    Raises:
        BadInput: anything in it, or in `changes`, is unknown, of the wrong type, out of range or empty.
    """
    raw, text = read(name)
    base = copy.deepcopy(raw)  # what the file says, before --set, names the rows' defaults
    for setting in changes.settings:
        _set(raw, setting)
    where = f"suite {name}"
    top = ("schema", "name", "title", "secret", "tuned", *TABLES, *_PLUGIN_TABLES)
    for key in raw:
        if key not in top:
            raise BadInput(f"{where}: unknown key `{key}`: {nearest(key, top)}")
    if type(raw.get("schema")) is not int or raw["schema"] != SCHEMA:
        raise BadInput(f"{where}: schema = {_shown(raw.get('schema'))}; this version reads schema = {SCHEMA}")
    for key in ("name", "title", "secret"):
        if not isinstance(raw.get(key, ""), str):
            raise BadInput(f"{where}: {key} = {_shown(raw[key])} is not a string; put it in quotes")
    title = raw.get("name", Path(name).stem)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", title):  # it becomes a folder
        raise BadInput(f"{where}: name = {_shown(title)}: use letters, digits, `.`, `_` and `-`")
    t: dict[str, dict[str, Any]] = {}
    for table, keys in TABLES.items():
        given = raw.get(table, {})
        if not isinstance(given, dict):
            raise BadInput(f"{where}: `{table}` must be a table, [{table}]")
        for key, value in given.items():
            if key not in keys:
                raise BadInput(f"{where}: unknown key `{key}` in [{table}]: {nearest(key, keys)}")
            _typed(where, table, key, value, keys[key])
        t[table] = DEFAULTS.get(table, {}) | given
    m = t["matrix"]
    for key in ("datasets", "archs", "attacks", "defenses"):
        if key not in m:
            raise BadInput(f"{where}: [matrix] {key} is missing; give a list of ids")
    m["datasets"] = _pick("dataset", m["datasets"], changes.datasets)
    m["archs"] = _pick("model", m["archs"], changes.archs)
    m["attacks"] = _pick("attack", m["attacks"], changes.attacks, keep=("none",))
    m["defenses"] = _pick("defense", m["defenses"], changes.defenses, keep=("none",))
    m["evaluators"] = _pick("evaluator", m["evaluators"], changes.evaluators)
    for plugin in tuple(m["evaluators"]):
        brought = registry.get("evaluator", plugin).blueprint.info.get("brings", ()) if isinstance(plugin, str) else ()
        m["evaluators"] = [*m["evaluators"], *(e for e in brought if e not in m["evaluators"])]
    m["rates"] = list(changes.rates) or m["rates"]
    calibration = m["seeds"][0] if m["seeds"] else 0
    m["seeds"] = list(changes.seeds) or m["seeds"]
    for key in ("datasets", "archs", "attacks", "defenses", "evaluators"):
        _items(where, f"[matrix] {key}", m[key], str)
    _rates(where, "[matrix] rates", m["rates"])
    own_rates = _own_rates(where, raw)
    _own_rates(where, base)
    if changes.rates:  # they are for all attacks
        own_rates = {}
    _items(where, "[matrix] seeds", m["seeds"], int)
    for seed in m["seeds"]:
        if seed < 0:
            raise BadInput(f"{where}: seed {seed} is negative; seeds start at 0")
    clean = t["access"]["clean"]
    if clean <= 0 or (isinstance(clean, float) and clean >= 1):
        raise BadInput(f"{where}: [access] clean = {clean}: give a share between 0 and 1, or a number of rows")
    injection = _injection(where, t["train"])
    append = t["train"].pop("poisoned") == "append"
    recipe = RECIPES[t["train"].pop("recipe")] | {k: v for k, v in t["train"].items() if k != "curves"}
    if changes.timeout is not None:
        t["budget"]["task_seconds"] = _typed("--timeout", "budget", "task_seconds", changes.timeout, (float, int))

    variants: dict[str, list[Variant]] = {}
    defaults: dict[str, dict[str, dict[str, Any]]] = {}
    for kind in METHODS:
        given, said = _plugin_table(where, raw, kind), _plugin_table(where, base, kind)
        for plugin, params in given.items():
            defaults.setdefault(kind, {})[plugin] = _sweep(registry, kind, plugin, params)[0]
        variants[kind] = []
        for plugin in m[kind + "s"]:
            normal = _sweep(registry, kind, plugin, said.get(plugin, {}))[0]
            for params in _sweep(registry, kind, plugin, given.get(plugin, {})):
                label = plugin if params == normal else f"{plugin}~{digest(params)[:6]}"
                variants[kind].append(Variant(id=plugin, label=label, params=params))
    models, sizes = _plugin_table(where, raw, "model"), _plugin_table(where, raw, "dataset")
    for plugin in (*m["archs"], *models):
        registry.get("model", plugin)
    for plugin in (*m["datasets"], *sizes):
        _check_dataset(registry, plugin)
    rows: dict[str, dict[str, int]] = {}
    for plugin, given in sizes.items():
        for key, value in given.items():
            if key not in _DATASET_KEYS:
                raise BadInput(f"{where}: unknown key `{key}` in [dataset.{plugin}]: {nearest(key, _DATASET_KEYS)}")
            if _typed(where, f"dataset.{plugin}", key, value, _DATASET_KEYS[key]) < 1:
                raise BadInput(f"{where}: [dataset.{plugin}] {key} = {value}: at least 1 row is needed")
        rows[plugin] = dict(given)
    suite = Suite(
        name=title,
        title=raw.get("title", ""),
        secret=raw.get("secret", PUBLIC_SECRET),
        datasets=tuple(m["datasets"]),
        dataset_rows=rows,
        archs=tuple(m["archs"]),
        arch_args={k: dict(v) for k, v in models.items()},
        attacks=tuple(variants["attack"]),
        rates=tuple(float(r) for r in m["rates"]),
        attack_rates=own_rates,
        defenses=tuple(variants["defense"]),
        evaluators=tuple(variants["evaluator"]),
        seeds=tuple(m["seeds"]),
        calibration_seed=calibration,
        recipe=recipe,
        curves=t["train"]["curves"],
        append=append,
        injection=injection,
        access=t["access"],
        budget=t["budget"],
        gate=t["gate"],
        defaults=defaults,
        tuned=_tuned(where, raw, defaults),
    )
    return suite, text
