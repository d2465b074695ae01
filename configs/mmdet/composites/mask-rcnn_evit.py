# EViT (2202.07800) on the ViT of mask-rcnn_vit.py, with the smallest keep rate of the paper.
_base_ = "mask-rcnn_vit.py"

model = dict(backbone=dict(model_name="evit_lvvit_small_patch16_224", keep_rate=0.5, reduce_at=(3, 6, 9)))
