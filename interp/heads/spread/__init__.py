"""Over how much a head spreads its attention."""
