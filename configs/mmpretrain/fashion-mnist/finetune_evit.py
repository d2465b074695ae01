# EViT (2202.07800).
_base_ = "_base_/finetune.py"

model = dict(model_name="evit_deit_tiny_patch16_224", keep_rate=0.6)
