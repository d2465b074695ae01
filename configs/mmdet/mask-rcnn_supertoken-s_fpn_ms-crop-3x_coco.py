# Super-token ViT S (2211.11167) with mmdet's 3x recipe for Swin; see the 1x config.
_base_ = "mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py"

custom_imports = dict(imports=["effvit.dense.openmmlab"], allow_failed_imports=False)

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

# Swin's recipe exempts all norms; those of the stem and the downsamplings are named otherwise here.
batch_norms = ("stem.2", "stem.5", "stem.8", "stem.11", "downsample.bn")
optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys={f"{name}.": dict(decay_mult=0.0) for name in batch_norms}),
)
