"""What the experiments on attention sinks share: texts as bytes, and the sink metric of a record."""
