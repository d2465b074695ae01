# EViT (2202.07800).
_base_ = "_base_/finetune.py"

model = dict(backbone=dict(sparsify=dict(method="evit", keep_rate=0.5, reduce_at=(2, 4, 6))))
