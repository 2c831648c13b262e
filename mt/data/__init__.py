"""Parallel text to rows of tokens."""
