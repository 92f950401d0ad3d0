"""What this machine has for headscope: packages and their versions, cards and kernels, the cache of models."""
