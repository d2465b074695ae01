# 10,240 images that the training of the package's weights did not see (another seed), at a tenth of its learning rate:
# as short as two cores allow, our choice. Seeds differ in their order. The leaf names the method.
_base_ = "../vit-nano_cutouts.py"

custom_imports = dict(
    imports=["effvit.dense.openmmlab", "effvit.dense.classifiers", "data.mmpretrain_sets"], allow_failed_imports=False
)

model = dict(type="EffViTClassifier", pretrained=True)
load_from = None
train_dataloader = dict(
    sampler=dict(_delete_=True, type="DefaultSampler", shuffle=True),
    dataset=dict(length=10_240, seed=1, patch_size=None),
)
optim_wrapper = dict(optimizer=dict(lr=1e-4))
train_cfg = dict(max_epochs=1, val_interval=1)
param_scheduler = [
    dict(type="CosineAnnealingLR", eta_min=1e-6, by_epoch=True, begin=0, end=1, convert_to_iter_based=True)
]
