"""Views of all heads at once: what kinds of heads there are."""
