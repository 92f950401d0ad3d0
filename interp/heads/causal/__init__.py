"""Heads by what the model loses without them: gates that are trained while the model stays as it is."""
