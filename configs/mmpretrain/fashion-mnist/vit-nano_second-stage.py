# Eight more epochs of vit-nano.py without CutMix and at a third of the learning rate:
#   python tools/train.py CONFIG --cfg-options load_from=work_dirs/vit-nano/epoch_24.pth
_base_ = "_base_/fashion-mnist.py"

model = dict(train_cfg=None)
optim_wrapper = dict(optimizer=dict(lr=3e-4))
train_cfg = dict(max_epochs=8)
param_scheduler = [
    dict(type="CosineAnnealingLR", eta_min=1e-6, by_epoch=True, begin=0, end=8, convert_to_iter_based=True)
]
