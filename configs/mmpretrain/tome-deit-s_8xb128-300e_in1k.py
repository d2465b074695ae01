# ToMe trained from scratch on DeiT-S at r 13, a model of the README of facebookresearch/ToMe@af95e4b. No training
# code is published; the recipe is DeiT's.
_base_ = "_base_/deit.py"

model = dict(model_name="tome_deit_small_patch16_224", r=13)
