"""Edits inside attention: of scores before softmax, and of the pattern after it."""
