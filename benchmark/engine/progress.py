"""What a run says on standard error while it works: a live line per busy slot on a terminal, plain lines elsewhere."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Mapping, Sequence

from sleeperbench.engine.graph import Plan
from sleeperbench.engine.pool import Slot

PLAIN_SECONDS = 15.0
LIVE_SECONDS = 0.1


def names(plan: Plan) -> dict[str, str]:
    """Task key -> what progress lines and messages call it."""
    found = {}
    for k, t in plan.tasks.items():
        replica = t.params.get("replica", 0)
        found[k] = f"clean model {replica}" if t.name == "none" and replica else f"{t.name} (control)"
        judged = plan.tasks.get(t.inputs.get("attack", "")) if t.kind == "defense" else None
        if judged is not None and judged.kind == "defense":
            found[k] = f"{t.name} on what {judged.name} made"
    for cell in plan.cells:
        short = cell.name
        found[cell.attack_key] = "/".join([*short.split("/")[:3], short.split("/")[-1]])
        if cell.defense_key:
            found[cell.defense_key] = short
        below = plan.tasks[cell.defense_key].inputs if cell.defense_key else {}
        while below:
            if key := below.get("prepared"):
                found[key] = "/".join([*short.split("/")[:2], plan.tasks[key].name, short.split("/")[-1]])
            below = plan.tasks[below["inner"]].inputs if "inner" in below else {}
        for e in cell.evaluations:
            if e.key:
                found[e.key] = f"{e.evaluator} {short}"
    return found


class Progress:
    """Counts tasks that ended; the time left is what the others are expected to take, at the pace so far."""

    def __init__(self, quiet: bool) -> None:
        self.done, self.seconds, self.quiet = 0, 0.0, quiet
        self.start = self.last = time.monotonic()
        self.live = sys.stderr.isatty() and not quiet
        self.lines = 0

    def finished(self, seconds: float) -> None:
        """A task ended that was expected to take so long."""
        self.done += 1
        self.seconds += seconds

    def clear(self) -> None:
        """Remove the live lines, so that something else can be printed."""
        if self.lines:
            sys.stderr.write(f"\x1b[{self.lines}F\x1b[J")
            sys.stderr.flush()
            self.lines = 0

    def say(self, text: str) -> None:
        """Print a line above the live ones."""
        if not self.quiet:
            self.clear()
            print(text, file=sys.stderr, flush=True)

    def left(self, ahead: float) -> str:
        """Time left for tasks that are expected to take `ahead` seconds, as the finished ones suggest."""
        if not self.seconds:
            return ""
        s = (time.monotonic() - self.start) / self.seconds * ahead
        return f", about {s / 60:.0f} min left" if s > 90 else f", about {s:.0f} s left"

    def show(self, slots: Sequence[Slot], names: Mapping[str, str], more: int, ahead: float) -> None:
        """Renew the live lines, or print a plain one now and then.

        Args:
            slots: What runs.
            names: Task key -> what to call it.
            more: Tasks that have not ended.
            ahead: Seconds that these are expected to take.
        """
        now = time.monotonic()
        if self.quiet or now - self.last < (LIVE_SECONDS if self.live else PLAIN_SECONDS):
            return
        self.last = now
        lines = [f"{self.done}/{self.done + more} tasks{self.left(ahead)}"]
        for s in slots:
            if s.task is not None:
                d, t, what = s.progress
                step = f" {what} {d}/{t}" if t else ""
                lines.append(f"  {s.task.kind} {names.get(s.task.key, s.task.name)}{step} {now - s.started:.0f} s")
        if self.live:
            self.clear()
            # A line that wraps would be two when they are removed.
            width = shutil.get_terminal_size().columns - 1
            sys.stderr.write("".join(f"{line[:width]}\n" for line in lines))
            sys.stderr.flush()
            self.lines = len(lines)
        else:
            print("; ".join(x.strip() for x in lines), file=sys.stderr, flush=True)
