"""The rhythm of a response: local heads that look back a phrase, and tokens that later ones come back to."""
