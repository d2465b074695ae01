# DeiT's recipe (2012.12877): that of imagenet.py with repeated augmentation, 5 epochs of warm-up and a drop path of
# 0.1, for 8 x 128 pictures.
_base_ = "imagenet.py"

model = dict(drop_path_rate=0.1)
train_dataloader = dict(sampler=dict(_delete_=True, type="RepeatAugSampler", shuffle=True))
optim_wrapper = dict(
    paramwise_cfg=dict(
        # From the start of their names: super-token blocks have a convolution `pos_embed`, which decays.
        custom_keys={"model.cls_token": dict(decay_mult=0.0), "model.pos_embed": dict(decay_mult=0.0)}
    )
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=True, end=5, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=1e-5, by_epoch=True, begin=5),
]
