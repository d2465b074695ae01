# The control of the methods with new weights: as many patches after the same blocks, the same ones in every image.
_base_ = "_base_/finetune.py"

model = dict(sparsify=dict(method="random", reduce_at=(3, 6, 9), num_tokens=(100, 70, 49), place="mlp"))
