"""The former name of `bench.ablations`: `python -m bench.evidence` still runs it."""

import sys

from .ablations import main

if __name__ == "__main__":
    sys.exit(main())
