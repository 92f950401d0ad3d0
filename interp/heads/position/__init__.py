"""Where heads look by position alone, and what depth makes of it."""
