# GTP (2311.03035) removes 8 of 196 patches of DeiT-S in every block, 4.1 %: here 128, 3 % of
# some 4200, which leaves enough of elongated pictures.
_base_ = "mask-rcnn_vit-b_fpn_1x_coco.py"

model = dict(backbone=dict(model_name="gtp_vit_base_patch16_224", num_prop=128))
