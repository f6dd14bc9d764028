"""Models as pure functions: loading, taking apart, choosing parameters."""
