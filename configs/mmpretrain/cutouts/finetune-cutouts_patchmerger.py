# PatchMerger (2202.12015): as many mixtures as DynamicViT keeps tokens; its new queries learn at ten times the rate.
_base_ = "_base_/finetune.py"

model = dict(sparsify=dict(method="patchmerger", num_tokens=(100, 70, 49), reduce_at=(3, 6, 9)))
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={".reducer.": dict(lr_mult=10.0)}))
