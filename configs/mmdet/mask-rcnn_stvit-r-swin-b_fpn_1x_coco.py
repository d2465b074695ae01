# STViT-R on Swin-B (2303.08685); see Swin-S. Drop path of its Cascade Mask R-CNN.
_base_ = "mask-rcnn_stvit-r-swin-s_fpn_1x_coco.py"

model = dict(
    backbone=dict(model_name="stvit_r_swin_base_patch4_window7_dense", drop_path_rate=0.3),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
