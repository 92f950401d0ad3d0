"""Ways to decode that look inside the model before they take a token."""
