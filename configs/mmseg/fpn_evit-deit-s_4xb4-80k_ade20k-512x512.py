# EViT (2202.07800): 70 % of the patches stay after blocks 4, 7 and 10, the setting of its tables.
# The pyramid of ViTDet under Semantic FPN; recipe as PVT.
_base_ = "_base_/fpn_pvt.py"

model = dict(
    backbone=dict(
        model_name="evit_deit_small_patch16_224",
        keep_rate=0.7,
        reduce_at=(3, 6, 9),
        img_size=512,
        pyramid=True,
        pretrained=True,
    ),
    neck=dict(in_channels=[96, 192, 384, 384]),
)
