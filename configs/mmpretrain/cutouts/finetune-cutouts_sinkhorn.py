# Sinkhorn (2308.04657): as many mixtures as DynamicViT keeps tokens; their new codes learn at ten times the rate.
_base_ = "_base_/finetune.py"

model = dict(sparsify=dict(method="sinkhorn", num_tokens=(100, 70, 49), reduce_at=(3, 6, 9)))
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={".reducer.": dict(lr_mult=10.0)}))
