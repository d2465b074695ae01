# Super-token ViT S (2211.11167) with the recipe of PVT for Semantic FPN. No dense code of it is public.
_base_ = "_base_/fpn_pvt.py"

model = dict(
    backbone=dict(model_name="supertoken_small_224", out_indices=(0, 1, 2, 3), out_norm=True),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
