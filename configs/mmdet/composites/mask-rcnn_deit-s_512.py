# A real size, for a GPU: DeiT-S with ImageNet weights on composites of 512 pixels, mmdet's 1x; not trained here.
#   python tools/get_data.py stamps photographs
#   python tools/make_composites.py --out data/composites-512 --train 20000 --val 1000
#   python tools/train.py configs/mmdet/composites/mask-rcnn_deit-s_512.py --amp
_base_ = "../mask-rcnn_deit-s_fpn_1x_coco.py"

classes = ("bird", "insect", "ungulate", "fruit", "flower", "building", "vehicle", "coin", "sign", "planet")

model = dict(
    backbone=dict(img_size=512),
    roi_head=dict(bbox_head=dict(num_classes=len(classes)), mask_head=dict(num_classes=len(classes))),
)

data = dict(data_root="data/composites-512/", metainfo=dict(classes=classes))
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(512, 512), keep_ratio=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
validation = dict(
    **data,
    ann_file="annotations/instances_validation.json",
    data_prefix=dict(img="images/validation/"),
    pipeline=test_pipeline,
)
train_dataloader = dict(
    batch_size=16,
    num_workers=12,
    dataset=dict(
        **data,
        ann_file="annotations/instances_training.json",
        data_prefix=dict(img="images/training/"),
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
            dict(type="RandomFlip", prob=0.5),
            dict(type="PhotoMetricDistortion"),  # the set has few backgrounds
            dict(type="PackDetInputs"),
        ],
    ),
)
val_dataloader = dict(batch_size=16, num_workers=4, dataset=validation)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file="data/composites-512/annotations/instances_validation.json")
test_evaluator = val_evaluator
