"""Architectures with weights of their own, one file each, and their parts."""
