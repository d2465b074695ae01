# ToMe off the shelf on timm's ViT-B/16 at r 13 (README of facebookresearch/ToMe@af95e4b). The tag names the weights
# of that time; timm's default is another now.
_base_ = "_base_/off_the_shelf_augreg.py"

model = dict(model_name="tome_vit_base_patch16_224.augreg_in21k_ft_in1k", r=13)
