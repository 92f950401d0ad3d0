"""Records: one Dataset of aligned examples, in memory, on disk, or lazily over parts."""
