# One more epoch from the weights of the package, for models whose weights have the names of vit-nano's; at a tenth of
# its learning rate (our choice). The leaf names the model:
#   python tools/train.py CONFIG --cfg-options load_from=work_dirs/vit-nano_third-stage/epoch_12.pth
_base_ = "fashion-mnist.py"

model = dict(
    img_size=28,
    patch_size=4,
    in_chans=1,
    embed_dim=96,
    depth=12,
    num_heads=3,
    train_cfg=None,
)
optim_wrapper = dict(optimizer=dict(lr=1e-4))
train_cfg = dict(max_epochs=1, val_interval=1)
param_scheduler = [
    dict(type="CosineAnnealingLR", eta_min=1e-6, by_epoch=True, begin=0, end=1, convert_to_iter_based=True)
]
