# The control of finetune-upernet_evit.py: as many patches after the same blocks, the same ones in every image.
_base_ = "_base_/finetune.py"

model = dict(backbone=dict(sparsify=dict(method="random", reduce_at=(2, 4, 6), num_tokens=(129, 66, 34), place="mlp")))
