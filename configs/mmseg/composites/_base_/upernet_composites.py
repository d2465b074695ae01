# A small UPerNet and 2000 iterations on the generated set (see configs/mmdet/composites), for two cores and some
# minutes. Class 0 is the background. Widths, learning rate and schedule are our choice.
_base_ = ["mmseg::_base_/models/upernet_swin.py", "mmseg::_base_/default_runtime.py"]

custom_imports = dict(imports=["effvit.dense.openmmlab"], allow_failed_imports=False)
classes = ("background", "fruit", "flower", "coin", "sign", "vehicle")
# Nine tenths of the pixels are background.
loss = dict(type="CrossEntropyLoss", class_weight=[0.5, 1.0, 1.0, 1.0, 1.0, 1.0])
norm_cfg = dict(type="BN", requires_grad=True)

model = dict(
    data_preprocessor=dict(size=(128, 128)),
    pretrained=None,
    decode_head=dict(channels=64, num_classes=len(classes), norm_cfg=norm_cfg, loss_decode=loss),
    auxiliary_head=dict(
        channels=32, num_classes=len(classes), norm_cfg=norm_cfg, loss_decode=dict(loss_weight=0.4, **loss)
    ),
)

data = dict(
    type="BaseSegDataset",
    data_root="data/composites/",
    metainfo=dict(classes=classes),
)
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(
        **data,
        data_prefix=dict(img_path="images/training", seg_map_path="annotations/training"),
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadAnnotations"),
            dict(type="RandomResize", scale=(128, 128), ratio_range=(0.75, 1.5), keep_ratio=True),
            dict(type="RandomCrop", crop_size=(128, 128)),
            dict(type="RandomFlip", prob=0.5),
            dict(type="PhotoMetricDistortion"),  # the set has few backgrounds
            dict(type="PackSegInputs"),
        ],
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        **data,
        data_prefix=dict(img_path="images/validation", seg_map_path="annotations/validation"),
        pipeline=[dict(type="LoadImageFromFile"), dict(type="LoadAnnotations"), dict(type="PackSegInputs")],
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"])
test_evaluator = val_evaluator

train_cfg = dict(type="IterBasedTrainLoop", max_iters=2000, val_interval=500)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-3, weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
    clip_grad=dict(max_norm=1.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type="CosineAnnealingLR", by_epoch=False, begin=50, end=2000, eta_min=1e-5),
]
default_hooks = dict(
    timer=dict(type="IterTimerHook"),
    logger=dict(type="LoggerHook", interval=50, log_metric_by_epoch=False),
    param_scheduler=dict(type="ParamSchedulerHook"),
    checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=500),
    sampler_seed=dict(type="DistSamplerSeedHook"),
    visualization=dict(type="SegVisualizationHook"),
)
randomness = dict(seed=0)
