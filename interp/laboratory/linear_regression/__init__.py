"""In-context linear regression: prompts, one layer of attention, what its weights say, and the predictors beside it."""
