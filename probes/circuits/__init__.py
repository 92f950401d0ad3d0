"""Circuits: the heads and MLPs that a behaviour goes through, found, compared and held to what they claim."""
