# Super-token ViT S (2211.11167) with mmdet's 3x recipe for Swin; see the 1x config.
_base_ = "mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py"

custom_imports = dict(imports=["effvit.openmmlab"], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True,
        type="EffViT",
        model_name="supertoken_small_224",
        out_indices=(0, 1, 2, 3),
        out_norm=True,
        drop_path_rate=0.1,
    ),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
