# EViT (2202.07800) on the ViT of mask-rcnn_vit.py, with the smallest keep rate in the README of its code.
_base_ = "mask-rcnn_vit.py"

model = dict(backbone=dict(model_name="evit_deit_tiny_patch16_224", keep_rate=0.5, reduce_at=(2, 4, 6)))
