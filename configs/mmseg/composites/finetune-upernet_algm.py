# ALGM (2406.09936), with the threshold of its scripts.
_base_ = "_base_/finetune.py"

model = dict(backbone=dict(sparsify=dict(method="algm")))
