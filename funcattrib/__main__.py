"""`python -m funcattrib` is the `funcattrib` command."""

import sys

from funcattrib.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
