# STViT-R on Swin-B as published (2303.08685; configs/swin of changsn/STViT-R-Object-Detection@8b8eb1e): as Swin-S but
# for the drop path.
_base_ = "cascade-mask-rcnn_stvit-r-swin-s_fpn_3x_coco.py"

model = dict(
    backbone=dict(model_name="stvit_r_swin_base_patch4_window7_dense", drop_path_rate=0.3),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
