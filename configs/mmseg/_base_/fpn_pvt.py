# Semantic FPN as PVT (2102.12122) trains it: 80k iterations of 16 pictures, AdamW with a rate of 1e-4. A leaf gives the
# backbone and its channels.
_base_ = [
    "mmseg::_base_/models/fpn_r50.py",
    "mmseg::_base_/datasets/ade20k.py",
    "mmseg::_base_/default_runtime.py",
    "mmseg::_base_/schedules/schedule_80k.py",
]

custom_imports = dict(imports=["effvit.dense.openmmlab"], allow_failed_imports=False)

model = dict(
    data_preprocessor=dict(size=(512, 512)),
    pretrained=None,
    backbone=dict(_delete_=True, type="EffViT", drop_path_rate=0.1),
    decode_head=dict(num_classes=150),
)
optim_wrapper = dict(_delete_=True, type="OptimWrapper", optimizer=dict(type="AdamW", lr=1e-4, weight_decay=1e-4))
param_scheduler = [dict(type="PolyLR", eta_min=0.0, power=0.9, begin=0, end=80000, by_epoch=False)]
train_dataloader = dict(batch_size=4)
