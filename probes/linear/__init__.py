"""Linear probes of head outputs, with their controls."""
