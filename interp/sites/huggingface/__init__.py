"""The Hugging Face site: AttentionCalls through transformers' attention and mask interfaces."""
