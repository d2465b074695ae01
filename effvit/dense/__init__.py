"""Backbones in detectors and segmenters, and their data checked before training."""
