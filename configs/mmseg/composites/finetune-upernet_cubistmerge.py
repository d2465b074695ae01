# CubistMerge (2509.21764).
_base_ = "_base_/finetune.py"

model = dict(backbone=dict(sparsify=dict(method="cubistmerge", r_h=4, r_w=4)))
