"""The tracer: one pass's pieces, the sessions and records they become; kept runs, and explicit maps."""
