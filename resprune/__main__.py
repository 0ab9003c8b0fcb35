"""`python -m resprune`: the same commands as `resprune`."""

import sys

from resprune.runtime.cli import main

if __name__ == "__main__":
    sys.exit(main())
