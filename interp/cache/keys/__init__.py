"""Policies that score keys once, when the prompt was read, and keep the best: one file each."""
