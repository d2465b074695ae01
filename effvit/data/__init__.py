"""Labelled images on this machine, and images as models take them."""
