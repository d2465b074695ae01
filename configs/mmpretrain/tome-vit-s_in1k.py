# ToMe off the shelf on timm's ViT-S/16 at r 13 (README of facebookresearch/ToMe@af95e4b).
_base_ = "_base_/off_the_shelf_augreg.py"

model = dict(model_name="tome_vit_small_patch16_224.augreg_in21k_ft_in1k", r=13)
