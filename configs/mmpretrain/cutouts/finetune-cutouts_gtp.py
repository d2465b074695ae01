# GTP (2311.03035).
_base_ = "_base_/finetune.py"

model = dict(sparsify=dict(method="gtp", num_prop=8))
