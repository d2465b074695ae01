# Expedite (2210.01035).
_base_ = "_base_/finetune.py"

model = dict(backbone=dict(sparsify=dict(method="expedite", keep_rate=0.25)))
