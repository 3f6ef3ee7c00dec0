"""``python -m benchmarks.summary``."""

import sys

from benchmarks.summary.command_line import main

if __name__ == "__main__":
    sys.exit(main())
