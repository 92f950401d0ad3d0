"""A report: one HTML page, and what it says of a folder of results."""
