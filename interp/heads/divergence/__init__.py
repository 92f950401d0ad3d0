"""Heads by what a part of the prompt changes about them: an image, a document, a system prompt, there and taken out."""
