# CAS-ViT M (2408.03703) as published: 40k iterations of 32 pictures, AdamW with a rate of 2e-4, drop path 0.1
# (segmentation/ of Tianfang-Zhang/CAS-ViT@041d2d6).
_base_ = "_base_/fpn_pvt.py"

model = dict(
    backbone=dict(model_name="casvit_m_224", out_indices=(0, 1, 2, 3), out_norm=True),
    neck=dict(in_channels=[64, 96, 192, 384]),
)
optim_wrapper = dict(optimizer=dict(lr=2e-4))
param_scheduler = [dict(type="PolyLR", eta_min=0.0, power=0.9, begin=0, end=40000, by_epoch=False)]
train_cfg = dict(max_iters=40000, val_interval=4000)
default_hooks = dict(checkpoint=dict(interval=4000))
