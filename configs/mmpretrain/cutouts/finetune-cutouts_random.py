# The control of finetune-cutouts_evit.py: as many patches after the same blocks, the same ones in every image.
_base_ = "_base_/finetune.py"

model = dict(sparsify=dict(method="random", reduce_at=(3, 6, 9), num_tokens=(88, 54, 34), place="mlp"))
