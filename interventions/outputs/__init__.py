"""Edits of what heads write: z, before the output projection."""
