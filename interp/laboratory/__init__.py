"""Where models are made that show a phenomenon: small, by committed recipes, and watched while they learn."""
