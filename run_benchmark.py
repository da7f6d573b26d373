"""The main job: run a suite, write the tables, render the site. Without arguments: suite `quick` into runs/quick."""

import sys

try:
    from sleeperbench.cli import main
except ImportError:
    print("sleeperbench is not installed: run `pip install -e .`, then this again", file=sys.stderr)
    sys.exit(2)
if __name__ == "__main__":
    sys.exit(main(["run", *(sys.argv[1:] or ["quick", "--out", "runs/quick"])]))
