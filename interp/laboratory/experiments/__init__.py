"""The laboratory's experiments: one file each."""
