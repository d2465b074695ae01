# One more epoch from the weights of the package at a tenth of their learning rate and without CutMix, as short as two
# cores allow: our choice. The leaf names the method.
_base_ = "fashion-mnist.py"

custom_imports = dict(imports=["effvit.dense.openmmlab", "effvit.dense.classifiers"], allow_failed_imports=False)

model = dict(type="EffViTClassifier", pretrained=True, train_cfg=None)
optim_wrapper = dict(optimizer=dict(lr=1e-4))
train_cfg = dict(max_epochs=1, val_interval=1)
param_scheduler = [
    dict(type="CosineAnnealingLR", eta_min=1e-6, by_epoch=True, begin=0, end=1, convert_to_iter_based=True)
]
