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
