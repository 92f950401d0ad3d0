"""Heads that rest: where attention goes that has nothing to read."""
