"""``python -m tests.fuzz COUNT [SEED] [TARGET …]``."""

import funcattrib.cli.main  # noqa: F401 — imported before children are forked
import tests.fuzz.targets  # noqa: F401
from tests.fuzz.run import main

if __name__ == "__main__":
    main()
