"""One attention layer learns the next token: the data, the model, and what the theory says its attention will do."""
