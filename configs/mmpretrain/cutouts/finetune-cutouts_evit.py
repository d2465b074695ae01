# EViT (2202.07800).
_base_ = "_base_/finetune.py"

model = dict(sparsify=dict(method="evit", keep_rate=0.6))
