# The ViT of the detectors (configs/mmdet/composites/mask-rcnn_vit.py) under the lightest head (FCN, 1411.4038). From
# random weights a plain ViT learns nothing from the boxes of some thousand pictures, so the detectors start from here.
_base_ = "upernet_vit.py"

model = dict(
    backbone=dict(out_indices=(7,)),
    decode_head=dict(
        _delete_=True,
        type="FCNHead",
        in_channels=128,
        in_index=0,
        channels=64,
        num_convs=1,
        kernel_size=3,
        concat_input=False,
        num_classes={{_base_.model.decode_head.num_classes}},
        norm_cfg=dict(type="BN", requires_grad=True),
        loss_decode={{_base_.model.decode_head.loss_decode}},
    ),
    auxiliary_head=None,
)
train_dataloader = dict(batch_size=16)
optim_wrapper = dict(type="BFloat16OptimWrapper")  # twice as fast on a CPU that has it
train_cfg = dict(max_iters=2500, val_interval=1250)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type="CosineAnnealingLR", by_epoch=False, begin=50, end=2500, eta_min=1e-5),
]
default_hooks = dict(checkpoint=dict(interval=1250))
