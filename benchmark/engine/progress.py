"""What a run says on standard error while it works: a live line per busy slot on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from sleeperbench.engine.pool import Slot

PLAIN_SECONDS = 15.0


class Progress:
    """Counts done tasks and estimates the time left from the pace so far."""

    def __init__(self, total: int, quiet: bool) -> None:
        self.total, self.done, self.quiet = total, 0, quiet
        self.start = self.last = time.monotonic()
        self.live = sys.stderr.isatty() and not quiet
        self.lines = 0

    def clear(self) -> None:
        """Remove the live lines, so that something else can be printed."""
        if self.lines:
            sys.stderr.write(f"\x1b[{self.lines}F\x1b[J")
            self.lines = 0

    def say(self, text: str) -> None:
        """Print a line above the live ones."""
        if not self.quiet:
            self.clear()
            print(text, file=sys.stderr, flush=True)

    def left(self) -> str:
        """Time left, as the finished tasks suggest."""
        if not self.done:
            return ""
        s = (time.monotonic() - self.start) / self.done * (self.total - self.done)
        return f", about {s / 60:.0f} min left" if s > 90 else f", about {s:.0f} s left"

    def show(self, slots: Sequence[Slot], names: dict[str, str]) -> None:
        """Renew the live lines, or print a plain one now and then."""
        now = time.monotonic()
        head = f"{self.done}/{self.total} tasks{self.left()}"
        texts = []
        for s in slots:
            if s.task is not None:
                d, t, what = s.progress
                step = f" {what} {d}/{t}" if t else ""
                texts.append(f"  {s.task.kind} {names.get(s.task.key, s.task.name)}{step} {now - s.started:.0f} s")
        if self.live:
            self.clear()
            sys.stderr.write("\n".join([head, *texts]) + "\n")
            sys.stderr.flush()
            self.lines = 1 + len(texts)
        elif not self.quiet and now - self.last > PLAIN_SECONDS:
            self.last = now
            print("; ".join([head, *(x.strip() for x in texts)]), file=sys.stderr, flush=True)
