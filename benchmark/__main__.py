"""`python -m sleeperbench` is the `sleeperbench` command."""

import sys

from sleeperbench.cli import main

if __name__ == "__main__":
    sys.exit(main())
