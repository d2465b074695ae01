# Super-token SViT (2211.11167), narrow: super tokens of 8 and 4 pixels a side in the first two stages, as published.
_base_ = "_base_/mask-rcnn_composites.py"

model = dict(
    backbone=dict(
        _delete_=True,
        type="EffViT",
        model_name="supertoken_small_224",
        dims=(48, 64, 128, 192),
        depths=(1, 2, 4, 1),
        num_heads=(1, 2, 4, 6),
        out_indices=(0, 1, 2, 3),
        out_norm=True,
    ),
    neck=dict(in_channels=[48, 64, 128, 192]),
)
