"""effvit: efficient, token-sparsifying vision-transformer backbones."""

__version__ = "0.1.0"
