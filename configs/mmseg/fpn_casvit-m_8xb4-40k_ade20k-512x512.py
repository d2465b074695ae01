# CAS-ViT M (2408.03703) as published: 40k iterations of 32 pictures, AdamW with a rate of 2e-4, drop path 0.1
# (segmentation/ of Tianfang-Zhang/CAS-ViT@041d2d6).
_base_ = [
    "mmseg::_base_/models/fpn_r50.py",
    "mmseg::_base_/datasets/ade20k.py",
    "mmseg::_base_/default_runtime.py",
    "mmseg::_base_/schedules/schedule_40k.py",
]

custom_imports = dict(imports=["effvit.openmmlab"], allow_failed_imports=False)

model = dict(
    data_preprocessor=dict(size=(512, 512)),
    pretrained=None,
    backbone=dict(
        _delete_=True,
        type="EffViT",
        model_name="casvit_m_224",
        out_indices=(0, 1, 2, 3),
        out_norm=True,
        drop_path_rate=0.1,
    ),
    neck=dict(in_channels=[64, 96, 192, 384]),
    decode_head=dict(num_classes=150),
)
optim_wrapper = dict(_delete_=True, type="OptimWrapper", optimizer=dict(type="AdamW", lr=2e-4, weight_decay=1e-4))
param_scheduler = [dict(type="PolyLR", eta_min=0.0, power=0.9, begin=0, end=40000, by_epoch=False)]
train_dataloader = dict(batch_size=4)
