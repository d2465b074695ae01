# Dense ViT-B (2106.10270, whose pictures lie between -1 and 1), the baseline of the methods on it.
_base_ = "_base_/mask-rcnn_vit.py"

model = dict(
    data_preprocessor=dict(mean=[127.5, 127.5, 127.5], std=[127.5, 127.5, 127.5]),
    backbone=dict(model_name="vit_base_patch16_224"),
    neck=dict(in_channels=768),
)
