# Twelve more epochs of vit-nano_second-stage.py from a higher learning rate:
#   python tools/train.py CONFIG --cfg-options load_from=work_dirs/vit-nano_second-stage/epoch_8.pth
_base_ = "vit-nano_second-stage.py"

optim_wrapper = dict(optimizer=dict(lr=6e-4))
train_cfg = dict(max_epochs=12)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=200),
    dict(type="CosineAnnealingLR", eta_min=1e-6, by_epoch=True, begin=0, end=12, convert_to_iter_based=True),
]
