# DynamicViT (2106.02034), its losses and the dense model as teacher; the new predictors learn at ten times the rate.
_base_ = "_base_/finetune.py"

custom_imports = dict(
    imports=["effvit.dense.openmmlab", "effvit.dense.learnt_pruning", "data.mmpretrain_sets"],
    allow_failed_imports=False,
)

model = dict(
    type="DynamicViTClassifier",
    sparsify=dict(method="dynamicvit", keep_rate=0.7),
    teacher=dict(model_name="vit_nano_patch8_96", pretrained=True),
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={"reducer.predictor": dict(lr_mult=10.0)}))
