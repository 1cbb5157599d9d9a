"""`python -m ktrdr_async`: the same as the command `ktrdr-async`."""

import sys

from ktrdr_async.cli import main

if __name__ == "__main__":
    sys.exit(main())
