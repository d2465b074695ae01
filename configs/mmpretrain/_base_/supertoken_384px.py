# Super-token SViT at 384 x 384 from weights of 224 x 224 (2211.11167): the commands in the README of
# hhb072/STViT@c9ed9a4, 30 epochs at a constant rate of 5e-6 for 8 x 64 pictures, weight decay 1e-8, otherwise DeiT's
# recipe. main.py keeps the model in eval mode while it fine-tunes: BatchNorm keeps its statistics, and the drop path of
# the commands does not act.
_base_ = "deit.py"

model = dict(drop_path_rate=0.0, norm_eval=True)
train_dataloader = dict(
    batch_size=64,
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
            dict(
                type="RandomErasing",
                erase_prob=0.25,
                mode="rand",
                min_area_ratio=0.02,
                max_area_ratio=1 / 3,
                fill_color=[103.53, 116.28, 123.675],
                fill_std=[57.375, 57.12, 58.395],
            ),
            dict(type="PackInputs"),
        ]
    ),
)
test = dict(
    dataset=dict(
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="ResizeEdge", scale=384, edge="short", backend="pillow", interpolation="bicubic"),
            dict(type="CenterCrop", crop_size=384),
            dict(type="PackInputs"),
        ]
    )
)
val_dataloader = test
test_dataloader = test
optim_wrapper = dict(optimizer=dict(lr=5e-6, weight_decay=1e-8))
param_scheduler = []
train_cfg = dict(max_epochs=30)
auto_scale_lr = dict(base_batch_size=512)
