"""Experiments of papers that find what carries a behaviour and then change it: lenses and patching put together with
edits, each beside its control."""
