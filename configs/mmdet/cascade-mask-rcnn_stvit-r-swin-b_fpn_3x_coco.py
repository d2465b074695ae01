# STViT-R on Swin-B as published (2303.08685; configs/swin of changsn/STViT-R-Object-Detection@8b8eb1e): 36 epochs,
# drop path 0.3.
_base_ = "_base_/cascade-mask-rcnn_3x.py"

model = dict(
    backbone=dict(
        _delete_=True,
        type="EffViT",
        model_name="stvit_r_swin_base_patch4_window7_dense",
        out_indices=(0, 1, 2, 3),
        drop_path_rate=0.3,
    ),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
