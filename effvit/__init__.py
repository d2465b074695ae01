"""effvit: efficient, token-sparsifying vision-transformer backbones.

``effvit.sparsify`` makes a timm vision transformer cheaper in one line; importing this package registers the
zoo's names with ``timm.create_model``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from effvit.compat import install
from effvit.requirements import check_timm

check_timm()  # before the first class of timm is extended: an older one lacks some
install()

from effvit.hosts.calibration import calibrate
from effvit.hosts.checkpoints import load_checkpoint
from effvit.hosts.compiling import compile
from effvit.hosts.host import TokenFeatures, list_methods, method_settings, register_host, sparsify
from effvit.hosts.rate_search import search_rates
from effvit.recover import register_fill, to_map, to_small_map
from effvit.reducers import Reducer, register_method
from effvit.reducers.registry import load_entry_points
from effvit.schedule import cosine_keep_rate
from effvit.selectors import (
    CropSelector,
    Selection,
    Selector,
    TokenSelector,
    VideoSelector,
    count_tokens,
    list_selectors,
    select_parts,
    select_tokens,
    select_video,
)
from effvit.tokens import TokenMap
from effvit.zoo import list_models, register_pyramid

if TYPE_CHECKING:
    from effvit.measure.flops import count_flops

__version__ = "0.2.0"
__all__ = [
    "CropSelector",
    "Reducer",
    "Selection",
    "Selector",
    "TokenFeatures",
    "TokenMap",
    "TokenSelector",
    "VideoSelector",
    "calibrate",
    "compile",
    "cosine_keep_rate",
    "count_flops",
    "count_tokens",
    "list_methods",
    "list_models",
    "list_selectors",
    "load_checkpoint",
    "method_settings",
    "register_fill",
    "register_host",
    "register_method",
    "register_pyramid",
    "search_rates",
    "select_parts",
    "select_tokens",
    "select_video",
    "sparsify",
    "to_map",
    "to_small_map",
]

load_entry_points()


def __getattr__(name: str) -> object:
    if name == "count_flops":  # on demand, since nothing else here needs fvcore
        return importlib.import_module("effvit.measure.flops").count_flops
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
