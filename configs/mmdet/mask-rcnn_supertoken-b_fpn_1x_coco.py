# Super-token ViT B (2211.11167); see S. Drop path of the classifier (README of hhb072/STViT@c9ed9a4).
_base_ = "mask-rcnn_supertoken-s_fpn_1x_coco.py"

model = dict(
    backbone=dict(model_name="supertoken_base_224", drop_path_rate=0.4),
    neck=dict(in_channels=[96, 192, 384, 512]),
)
