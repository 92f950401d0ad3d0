"""A small vision transformer, and what each of its heads does: importance, reach in the picture, patterns."""
