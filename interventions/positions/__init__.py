"""Edits of positions: which place a token is rotated to, and which tokens it then sees."""
