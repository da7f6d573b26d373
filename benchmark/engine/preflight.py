"""Before anything is trained: import every plugin of the run and try its parameters, in a process of its own.

JSON on standard input: {"plugins": [{"kind", "id", "params", "fits": [[shape, classes], ...]}],
"specs": [...]}; JSON back: a list of {"code", "message"}.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sleeperbench.engine.graph import Plan
    from sleeperbench.engine.task import Task


def ask(plan: Plan, tasks: Iterable[Task]) -> None:
    """Have a process of its own import every plugin of these tasks and try its parameters.

    Raises:
        BadInput: parameters do not fit.
        BrokenPlugin: a plugin cannot be imported, or ends the process.
    """
    from sleeperbench.errors import BadInput, BrokenPlugin, SleeperBenchError

    fits = [[list(d.shape), d.classes] for d in plan.datasets.values()]
    seen: dict[str, dict[str, Any]] = {}
    specs: dict[str, Any] = {}
    met: set[int] = set()  # parameters are shared by thousands of tasks
    for task in tasks:
        method = task.params["method"]
        if id(method) not in met:
            met.add(id(method))
            entry = {"kind": task.of, "id": task.name, "params": method}
            seen[json.dumps(entry, sort_keys=True)] = entry | {"fits": fits}
        if "spec" in task.params and id(task.params["spec"]) not in met:
            met.add(id(task.params["spec"]))
            specs[json.dumps(task.params["spec"], sort_keys=True)] = task.params["spec"]
    request = {"plugins": [seen[k] for k in sorted(seen)], "specs": [specs[k] for k in sorted(specs)]}
    answer = subprocess.run(
        [sys.executable, "-m", "sleeperbench.engine.preflight"],
        input=json.dumps(request),
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    if answer.returncode or not answer.stdout:
        raise BrokenPlugin("a plugin ended the process that imported it; its output stands above")
    problems = json.loads(answer.stdout)
    if problems:
        error: type[SleeperBenchError] = BrokenPlugin if any(p["code"] == 3 for p in problems) else BadInput
        raise error("; ".join(p["message"] for p in problems))


def main() -> None:
    """Answer one request."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    problems = check(json.loads(sys.stdin.read()))
    answers.write(json.dumps(problems))
    answers.close()


def check(request: dict[str, Any]) -> list[dict[str, Any]]:
    """What is wrong with the plugins and models of a run."""
    from sleeperbench.contracts.models import ModelSpec
    from sleeperbench.engine.registry import Registry
    from sleeperbench.errors import SleeperBenchError

    registry = Registry.discover()
    problems = []

    def note(code: int, message: str) -> None:
        problems.append({"code": code, "message": " ".join(message.split())})

    for p in request["plugins"]:
        name = f"{p['kind']} `{p['id']}`"
        try:
            methods = _made(registry, p["kind"], p["id"], p["params"])
        except SleeperBenchError as e:
            note(e.exit_code, str(e))
            continue
        except (TypeError, ValueError) as e:
            note(2, f"{name}: {e}; correct its parameters")
            continue
        except Exception as e:
            note(3, f"{name} cannot be made: {type(e).__name__}: {e}; mend or uninstall its distribution")
            continue
        misfits = []
        for shape, classes in p["fits"]:
            try:
                for method in methods:
                    method.check(tuple(shape), classes)
            except ValueError as e:
                misfits.append(f"{name} on images {tuple(shape)}: {e}")
            except Exception as e:
                note(3, f"{name}: its check raises {type(e).__name__}: {e}; mend or uninstall its distribution")
        # Of several data sets an attack may fit some alone: on the others its own task declines.
        if p["kind"] != "attack" or len(misfits) == len(p["fits"]):
            for misfit in misfits:
                note(2, misfit)
    if request["specs"]:
        from sleeperbench.kit.classifier import traits

        for spec in request["specs"]:
            try:
                traits(ModelSpec.from_json(spec))
            except SleeperBenchError as e:
                note(e.exit_code, str(e))
            except (TypeError, ValueError) as e:
                note(2, f"model `{spec['arch']}` with {spec['args']} on images {tuple(spec['shape'])}: {e}")
    return problems


def _made(registry: Any, kind: str, plugin: str, params: dict[str, Any]) -> list[Any]:
    """The method; of an attack that wraps another, both. A wrapped defense has a task of its own."""
    outer, *inner = registry.chain(kind, plugin)
    if kind != "attack" or not inner:
        return [registry.load(kind, outer.id).from_params(params)]
    own = {k: v for k, v in params.items() if k != "inner"}
    return [
        registry.load(kind, outer.id).from_params(own),
        registry.load(kind, inner[0].id).from_params(params["inner"]),
    ]


if __name__ == "__main__":
    main()
