"""The version of this package: stores are marked with it."""

__version__ = "0.1.0"
