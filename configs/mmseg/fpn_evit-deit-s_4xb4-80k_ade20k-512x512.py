# EViT (2202.07800): 70 % of the patches stay after blocks 4, 7 and 10, the setting of its tables.
# The pyramid of ViTDet under Semantic FPN; recipe as PVT (2102.12122).
_base_ = [
    "mmseg::_base_/models/fpn_r50.py",
    "mmseg::_base_/datasets/ade20k.py",
    "mmseg::_base_/default_runtime.py",
    "mmseg::_base_/schedules/schedule_80k.py",
]

custom_imports = dict(imports=["effvit.openmmlab"], allow_failed_imports=False)

model = dict(
    data_preprocessor=dict(size=(512, 512)),
    pretrained=None,
    backbone=dict(
        _delete_=True,
        type="EffViT",
        model_name="evit_deit_small_patch16_224",
        keep_rate=0.7,
        reduce_at=(3, 6, 9),
        img_size=512,
        pyramid=True,
        pretrained=True,
        drop_path_rate=0.1,
    ),
    neck=dict(in_channels=[96, 192, 384, 384]),
    decode_head=dict(num_classes=150),
)
optim_wrapper = dict(_delete_=True, type="OptimWrapper", optimizer=dict(type="AdamW", lr=1e-4, weight_decay=1e-4))
param_scheduler = [dict(type="PolyLR", eta_min=0.0, power=0.9, begin=0, end=80000, by_epoch=False)]
train_dataloader = dict(batch_size=4)
