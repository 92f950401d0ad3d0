"""Long work: files written whole, journals that resume, progress, estimates, provenance."""
