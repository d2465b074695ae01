# EViT (2202.07800): 70 % of the patches stay after blocks 4, 7 and 10, the setting of its tables.
_base_ = "upernet_vit-b_8xb2-160k_ade20k-512x512.py"

model = dict(backbone=dict(model_name="evit_vit_base_patch16_224", keep_rate=0.7, reduce_at=(3, 6, 9)))
