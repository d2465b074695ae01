# ToMe (2210.09461) merges 13 of 196 patches of DeiT-S in every block, 6.6 %: here 278 of some 4200.
_base_ = "mask-rcnn_vit-b_fpn_1x_coco.py"

model = dict(backbone=dict(model_name="tome_vit_base_patch16_224", r=278))
