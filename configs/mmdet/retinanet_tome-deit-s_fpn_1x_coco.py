# ToMe (2210.09461) merges 13 of 196 patches of DeiT-S in every block, 6.6 %: here 278 of some 4200.
_base_ = "_base_/retinanet_vit.py"

model = dict(backbone=dict(model_name="tome_deit_small_patch16_224", r=278))
