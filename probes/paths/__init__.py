"""How what heads and MLPs write reaches the residual stream, and the stream the logits, with norms held still."""
