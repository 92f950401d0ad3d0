"""Which position a network of attention layers prefers: data in which it cannot matter, the network, and the theory."""
