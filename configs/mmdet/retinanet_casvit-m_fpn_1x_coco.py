# CAS-ViT M (2408.03703) as published: 12 epochs, AdamW with a rate of 2e-4 and weight decay of 1e-4, drop path 0.1,
# batch norm in eval mode (detection/ of Tianfang-Zhang/CAS-ViT@041d2d6).
_base_ = [
    "mmdet::_base_/models/retinanet_r50_fpn.py",
    "mmdet::_base_/datasets/coco_detection.py",
    "mmdet::_base_/schedules/schedule_1x.py",
    "mmdet::_base_/default_runtime.py",
]

custom_imports = dict(imports=["effvit.dense.openmmlab"], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True,
        type="EffViT",
        model_name="casvit_m_224",
        out_indices=(0, 1, 2, 3),
        out_norm=True,
        drop_path_rate=0.1,
        norm_eval=True,
    ),
    neck=dict(in_channels=[64, 96, 192, 384]),
)
optim_wrapper = dict(optimizer=dict(_delete_=True, type="AdamW", lr=2e-4, weight_decay=1e-4))
train_dataloader = dict(batch_size=4)
