"""Before anything is trained: import every plugin of the run and try its parameters, in a process of its own.

JSON on standard input: {"plugins": [{"kind", "id", "params", "fits": [[shape, classes], ...]}],
"specs": [...]}; JSON back: a list of {"code", "message"}.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


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
            outermost = registry.chain(p["kind"], p["id"])[0]
            method = registry.load(p["kind"], outermost.id).from_params(p["params"])
        except SleeperBenchError as e:
            note(e.exit_code, str(e))
            continue
        except (TypeError, ValueError) as e:
            note(2, f"{name}: {e}; correct its parameters")
            continue
        except Exception as e:
            note(3, f"{name} cannot be made: {type(e).__name__}: {e}; mend or uninstall its distribution")
            continue
        for shape, classes in p["fits"]:
            try:
                method.check(tuple(shape), classes)
            except ValueError as e:
                note(2, f"{name} on images {tuple(shape)}: {e}")
            except Exception as e:
                note(3, f"{name}: its check raises {type(e).__name__}: {e}; mend or uninstall its distribution")
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


if __name__ == "__main__":
    main()
