# The learning rate of vit-nano_cutouts.py down to 0 on images that it has not seen: after its 27 epochs another 12.
#   python tools/train.py CONFIG --cfg-options load_from=work_dirs/vit-nano_cutouts/epoch_27.pth \
#     train_dataloader.sampler.first_epoch=27
_base_ = "vit-nano_cutouts.py"

train_cfg = dict(max_epochs=12)
param_scheduler = [
    dict(type="LinearLR", start_factor=1, end_factor=1e-3, by_epoch=True, begin=0, end=12, convert_to_iter_based=True)
]
