"""Drawn scenes with a planted prior: images whose every object, place and companion is known."""
