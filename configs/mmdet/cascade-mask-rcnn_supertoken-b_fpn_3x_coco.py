# Super-token ViT B (2211.11167) with the detector and recipe of Swin; no dense code of it is public.
_base_ = "_base_/cascade-mask-rcnn_3x.py"

model = dict(
    backbone=dict(
        _delete_=True,
        type="EffViT",
        model_name="supertoken_base_224",
        out_indices=(0, 1, 2, 3),
        out_norm=True,
        drop_path_rate=0.4,
    ),
    neck=dict(in_channels=[96, 192, 384, 512]),
)

# Swin's recipe exempts all norms; those of the stem and the downsamplings are named otherwise here.
batch_norms = ("stem.2", "stem.5", "stem.8", "stem.11", "downsample.bn")
optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys={f"{name}.": dict(decay_mult=0.0) for name in batch_norms}),
)
