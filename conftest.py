"""Without JAX, the doctests of what needs it are left out. What was imported before the tests is not collected."""

import gc
from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("jax") else ["funcattrib/jax/*"]


def pytest_collection_finish() -> None:
    """Freeze what is imported by now: a collection by a test or by transformers' Trainer else looks at all of it."""
    gc.collect()
    gc.freeze()
