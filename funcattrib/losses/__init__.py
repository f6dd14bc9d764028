"""Losses of language models, by name or by hand."""
