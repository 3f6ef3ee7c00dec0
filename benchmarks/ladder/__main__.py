"""``python -m benchmarks.ladder``."""

import sys

from benchmarks.ladder.command_line import main

if __name__ == "__main__":
    sys.exit(main())
