# ToMe (2210.09461).
_base_ = "_base_/finetune.py"

model = dict(backbone=dict(sparsify=dict(method="tome", r=24)))
