"""Every architecture of transformers, shrunk, built, traced and compared: what is right, what is refused."""
