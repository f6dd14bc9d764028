"""Without JAX, the doctests of what needs it are left out."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("jax") else ["funcattrib/jax/*"]
