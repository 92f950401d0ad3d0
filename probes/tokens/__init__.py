"""How a tokenizer cuts what a prompt is about."""
