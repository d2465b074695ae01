# CAS-ViT-M (2408.03703) fine-tuned at 384 x 384: the command in the README and main.py of
# Tianfang-Zhang/CAS-ViT@041d2d6, which accumulates two batches of 8 x 64: a rate of 5e-5 for 30 epochs, of which 20
# warm up, and no drop path. Its sampler of several picture sizes (160 to 320) is left out: all are 384 here, as in its
# test.
_base_ = "casvit-m_8xb256-300e_in1k.py"

model = dict(model_name="casvit_m_384", pretrained="checkpoints/casvit_m_224.pth", drop_path_rate=0.0)
train_dataloader = dict(
    batch_size=128,
    dataset=dict(
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="RandomResizedCrop", scale=384, backend="pillow", interpolation="bicubic"),
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
test = dict(
    dataset=dict(
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="Resize", scale=384, backend="pillow", interpolation="bicubic"),
            dict(type="PackInputs"),
        ]
    )
)
val_dataloader = test
test_dataloader = test
optim_wrapper = dict(optimizer=dict(lr=5e-5))
param_scheduler = [dict(type="LinearLR", start_factor=1e-6, by_epoch=True, end=20, convert_to_iter_based=True)]
train_cfg = dict(max_epochs=30)
auto_scale_lr = dict(base_batch_size=1024)
