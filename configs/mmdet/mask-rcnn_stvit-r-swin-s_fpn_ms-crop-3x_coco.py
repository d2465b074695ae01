# STViT-R on Swin-S (2303.08685) with mmdet's 3x recipe for Swin.
_base_ = "mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py"

custom_imports = dict(imports=["effvit.dense.openmmlab"], allow_failed_imports=False)

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
