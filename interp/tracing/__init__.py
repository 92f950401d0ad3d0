"""What the tracer is made of: one pass's plan, its pieces, the sessions and records they become."""
