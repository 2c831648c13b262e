"""Gemma as pure functions over a plain pytree."""
