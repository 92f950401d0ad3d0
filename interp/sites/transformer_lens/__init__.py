"""The TransformerLens site: AttentionCalls from the hook points of a TransformerBridge."""
