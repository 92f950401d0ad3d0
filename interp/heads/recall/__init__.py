"""Heads that bring back what the context says: generation decides."""
