# ToMe (2210.09461) merges 13 of 196 patches of DeiT-S in every block, 6.6 %: here 68 of some 1024.
_base_ = "upernet_vit-b_8xb2-160k_ade20k-512x512.py"

model = dict(backbone=dict(model_name="tome_vit_base_patch16_224", r=68))
