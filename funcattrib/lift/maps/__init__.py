"""Gradient maps, one family a file."""
