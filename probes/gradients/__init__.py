"""Attention times its gradient, without maps: which weights a loss depends on, at any length."""
