"""Heads that look up one key a query: a previous token, an earlier occurrence, what followed it."""
