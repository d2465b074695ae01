"""Families of timm that are no hosts, by the module of their class, and what in them stands against it."""

from __future__ import annotations

__all__ = ["UNSERVED"]

_CONVOLVED = "convolutions between its layers need every patch at its place on the full grid"

_CONVOLUTIONAL = "its blocks stand between convolutions, which need every patch at its place on the full grid"

UNSERVED = {
    "cait": "its heads mix their attention maps (talking heads), which no fused kernel does, and its class token comes "
    "behind the blocks that would be reduced",
    "xcit": f"it attends between channels, not tokens, and {_CONVOLVED}",
    "volo": "its outlook attention gathers the neighbours of every patch on the full grid, which is pooled between its "
    "stages",
    "pit": "it pools the grid between stages by a convolution, which needs every patch at its place",
    "mvitv2": "its attention pools queries, keys and values by convolutions on the full grid",
    "pvt_v2": "keys and values are pooled by a convolution, and each MLP has one too, on the full grid",
    "maxxvit": f"it attends inside windows and strided grids of a full map, and {_CONVOLVED}",
    "twins": "it attends inside windows of a full map, and to keys that a convolution has pooled",
    "nest": "it attends inside blocks of a full map, which is pooled by convolutions between its stages",
    "coat": f"its attention is factorised, without a map of pairs of tokens, and {_CONVOLVED}",
    "crossvit": "its two branches cut the image into patches of different sizes and exchange their class tokens",
    "tnt": "every patch holds a sequence of pixel tokens of its own, beside the sequence of patches",
    "convit": "its gated attention mixes in a map of positions behind the softmax, which no fused kernel does",
    "levit": "it shrinks the grid between stages by strides, which need every patch at its place",
    "davit": f"it attends inside windows and between channels of a full map, and {_CONVOLVED}",
    "efficientvit_msra": "each head reads what the head before it gives, and its tokens are convolved between layers",
    "edgenext": f"it attends between channels, not tokens, and {_CONVOLUTIONAL}",
    "cpubone": f"it attends to maps that convolutions have made coarser, and {_CONVOLUTIONAL}",
    "lowformer": f"it attends to maps that convolutions have made coarser, and {_CONVOLUTIONAL}",
    "mobilevit": f"it attends between pixels at the same place of different patches, and {_CONVOLUTIONAL}",
    "csatv2": _CONVOLUTIONAL,
    "efficientformer": _CONVOLUTIONAL,
    "efficientformer_v2": _CONVOLUTIONAL,
    "fastvit": _CONVOLUTIONAL,
    "metaformer": _CONVOLUTIONAL,
    "nextvit": _CONVOLUTIONAL,
    "swiftformer": _CONVOLUTIONAL,
    "visformer": _CONVOLUTIONAL,
    "swin_transformer_v2_cr": "a network with dropout inside makes its position biases, trained on the pairs of whole "
    "windows; create a swinv2_ model without _cr",
    "gcvit": f"it attends inside windows of a full map, and {_CONVOLVED}",
}
"""The last part of ``timm.models.*`` -> a clause."""
