"""Patching: what of one run, put into another, moves the model's answer."""
