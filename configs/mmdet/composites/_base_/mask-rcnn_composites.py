# A small Mask R-CNN and three epochs on the generated set, for two cores and some minutes. The set:
#   python tools/get_data.py stamps photographs
#   python tools/make_composites.py --out data/composites --train 3000 --val 300 --size 128 --objects 1 4 \
#     --classes fruit flower coin sign vehicle
# Widths, learning rate and schedule are our choice; a leaf adds the backbone and what it needs.
_base_ = ["mmdet::_base_/models/mask-rcnn_r50_fpn.py", "mmdet::_base_/default_runtime.py"]

custom_imports = dict(imports=["effvit.dense.openmmlab"], allow_failed_imports=False)
classes = ("fruit", "flower", "coin", "sign", "vehicle")
channels = 64

model = dict(
    neck=dict(out_channels=channels),
    rpn_head=dict(in_channels=channels, feat_channels=channels, anchor_generator=dict(scales=[4])),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=channels),
        # A picture has one to four objects: boxes of all classes share their weights.
        bbox_head=dict(in_channels=channels, fc_out_channels=256, num_classes=len(classes), reg_class_agnostic=True),
        mask_roi_extractor=dict(out_channels=channels),
        mask_head=dict(num_convs=2, in_channels=channels, conv_out_channels=channels, num_classes=len(classes)),
    ),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=500, max_per_img=200),
        # Without the bound background is nearly all that the head sees in the first iterations.
        rcnn=dict(sampler=dict(num=64, neg_pos_ub=3)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=500, max_per_img=200)),
)

data = dict(
    type="CocoDataset",
    data_root="data/composites/",
    metainfo=dict(classes=classes),
)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),  # the set has few backgrounds
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(128, 128), keep_ratio=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(
        **data,
        ann_file="annotations/instances_training.json",
        data_prefix=dict(img="images/training/"),
        filter_cfg=dict(filter_empty_gt=True),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=8,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        **data,
        ann_file="annotations/instances_validation.json",
        data_prefix=dict(img="images/validation/"),
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(
    type="CocoMetric", ann_file="data/composites/annotations/instances_validation.json", metric=["bbox", "segm"]
)
test_evaluator = val_evaluator

train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=3, val_interval=3)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=5e-4, weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
    clip_grad=dict(max_norm=1.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type="CosineAnnealingLR", by_epoch=True, begin=0, end=3, eta_min=1e-5, convert_to_iter_based=True),
]
randomness = dict(seed=0)
