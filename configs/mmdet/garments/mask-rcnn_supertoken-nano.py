# Super-token SViT (2211.11167) with the three stages of fashion-mnist/scratch_supertoken.py, from random weights.
_base_ = "_base_/mask-rcnn_garments.py"

model = dict(
    backbone=dict(
        _delete_=True,
        type="EffViT",
        model_name="supertoken_small_224",
        in_chans=1,
        dims=(64, 96, 192),
        depths=(2, 4, 2),
        num_heads=(2, 3, 6),
        stoken_size=(4, 2, 1),
        n_iter=(1, 1, 1),
        layerscale=(False, False, False),
        out_indices=(0, 1, 2),
        out_norm=True,
    ),
    neck=dict(in_channels=[64, 96, 192]),
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=1.0))))
