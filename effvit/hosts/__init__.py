"""Plain and windowed vision transformers that take a reduction method, and what loads and refuses them."""
