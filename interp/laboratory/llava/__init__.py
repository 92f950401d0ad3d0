"""A small vision-language model, trained on drawn scenes so that it sees, and hallucinates, as large ones do."""
