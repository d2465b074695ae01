"""Attention, super tokens, windows and resampling that reducers and architectures are built from."""
