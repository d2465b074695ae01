# STViT-R on Swin-S as published (2303.08685; configs/swin of changsn/STViT-R-Object-Detection@8b8eb1e): 36 epochs,
# drop path 0.2.
_base_ = "_base_/cascade-mask-rcnn_3x.py"

model = dict(
    backbone=dict(
        _delete_=True,
        type="EffViT",
        model_name="stvit_r_swin_small_patch4_window7_dense",
        out_indices=(0, 1, 2, 3),
        drop_path_rate=0.2,
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)

# Swin's recipe exempts all norms; those of STViT-R's stem are named otherwise.
optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys={f"stem.conv{i}.bn": dict(decay_mult=0.0) for i in (1, 2)}),
)
