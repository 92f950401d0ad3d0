"""In-context classification of Reddy (2024): sequences, the attention-only network, its progress measures."""
