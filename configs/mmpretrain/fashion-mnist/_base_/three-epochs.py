# Three epochs from random weights without CutMix, to compare architectures at the same budget.
_base_ = "fashion-mnist.py"

model = dict(train_cfg=None)
train_cfg = dict(max_epochs=3, val_interval=3)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=False, begin=0, end=200),
    dict(type="CosineAnnealingLR", eta_min=1e-5, by_epoch=True, begin=0, end=3, convert_to_iter_based=True),
]
