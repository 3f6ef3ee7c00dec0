"""``python -m benchmarks.full_batch``."""

import sys

from benchmarks.full_batch.command_line import main

if __name__ == "__main__":
    sys.exit(main())
