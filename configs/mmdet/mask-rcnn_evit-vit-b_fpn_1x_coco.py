# EViT (2202.07800): 70 % of the patches stay after blocks 4, 7 and 10, the setting of its tables.
_base_ = "mask-rcnn_vit-b_fpn_1x_coco.py"

model = dict(backbone=dict(model_name="evit_vit_base_patch16_224", keep_rate=0.7, reduce_at=(3, 6, 9)))
