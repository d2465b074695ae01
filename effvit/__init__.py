"""effvit: efficient, token-sparsifying vision-transformer backbones.

``effvit.sparsify`` makes a timm vision transformer cheaper in one line; importing this package registers the
zoo's names with ``timm.create_model``.
"""

from effvit.models._checkpoint import load_checkpoint
from effvit.models.host import TokenFeatures, list_methods, method_settings, sparsify
from effvit.models.zoo import list_models, register_pyramid
from effvit.recover import to_map
from effvit.schedule import cosine_keep_rate
from effvit.tokens import TokenMap

__version__ = "0.1.0"
__all__ = [
    "TokenFeatures",
    "TokenMap",
    "cosine_keep_rate",
    "list_methods",
    "list_models",
    "load_checkpoint",
    "method_settings",
    "register_pyramid",
    "sparsify",
    "to_map",
]
