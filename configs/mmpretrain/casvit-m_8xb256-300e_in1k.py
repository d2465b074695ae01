# CAS-ViT-M (2408.03703): the command in the README and main.py of Tianfang-Zhang/CAS-ViT@041d2d6, which accumulates
# two batches of 8 x 128: a rate of 6e-3, no Mixup, CutMix or erasing, one classifier, and a moving average of the
# weights that is evaluated. The warm-up starts at 0 there; mmengine's LinearLR takes a start_factor of 0 but divides by
# it at its second step, so the first step has a rate of 6e-9 here in place of 0, and later ones differ by less.
# mmpretrain has no sampler of several picture sizes (160 to 320 there): all are 224 here.
_base_ = "_base_/imagenet.py"

model = dict(model_name="casvit_m_224", distilled=False, drop_path_rate=0.1, train_cfg=None)
train_dataloader = dict(
    batch_size=256,
    dataset=dict(
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="RandomResizedCrop", scale=224, backend="pillow", interpolation="bicubic"),
            dict(type="RandomFlip", prob=0.5, direction="horizontal"),
            dict(
                type="RandAugment",
                policies="timm_increasing",
                num_policies=2,
                total_level=10,
                magnitude_level=9,
                magnitude_std=0.5,
                hparams=dict(pad_val=[104, 116, 124], interpolation="bicubic"),
            ),
            dict(type="PackInputs"),
        ]
    ),
)
optim_wrapper = dict(optimizer=dict(lr=6e-3))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=True, end=20, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=1e-6, by_epoch=True, begin=20, convert_to_iter_based=True),
]
auto_scale_lr = dict(base_batch_size=2048)
custom_hooks = [dict(type="EMAHook", momentum=5e-4, update_buffers=True, priority="ABOVE_NORMAL")]
