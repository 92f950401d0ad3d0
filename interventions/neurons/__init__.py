"""Edits of MLP neurons."""
