"""What one attention layer computes with, its parts, and what handlers do with it."""
