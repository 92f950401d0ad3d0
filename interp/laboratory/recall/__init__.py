"""A recall task in which the one relevant token of every answer is known."""
