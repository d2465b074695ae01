# The small Mask R-CNN of the composites on cut-outs of Fashion-MNIST, from the ViT that was trained to name them; two
# epochs. The set:
#   python tools/get_data.py fashion_mnist photographs
#   python tools/make_composites.py --garments --out data/garments --train 8000 --val 500 --size 64 --scale 0.3 0.75 \
#     --objects 1 3
# The pictures are read in grey, as the weights know them. Blocks, neck, rates and schedule are our choice;
# ViTDet's neck and its LayerNorms learn more slowly here.
_base_ = "../../composites/_base_/mask-rcnn_composites.py"

classes = (
    "t-shirt-top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle-boot",
)
strides = [4, 8, 16]

model = dict(
    data_preprocessor=dict(mean=[72.93], std=[90.015], bgr_to_rgb=False),
    backbone=dict(
        _delete_=True,
        type="EffViT",
        model_name="vit_nano_patch4_28",
        pretrained=True,  # comes with the package
        img_size=64,
        out_indices=(7,),  # of 12: the last ones serve the class token
    ),
    neck=dict(_delete_=True, type="FPN", in_channels=[96], out_channels=64, num_outs=len(strides)),
    rpn_head=dict(anchor_generator=dict(strides=strides)),
    roi_head=dict(
        bbox_roi_extractor=dict(featmap_strides=strides),
        bbox_head=dict(num_classes=len(classes)),
        mask_roi_extractor=dict(featmap_strides=strides),
        mask_head=dict(num_classes=len(classes)),
    ),
)

data = dict(data_root="data/garments/", metainfo=dict(classes=classes))
load = dict(type="LoadImageFromFile", color_type="grayscale")
train_pipeline = [
    load,
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    load,
    dict(type="Resize", scale=(64, 64), keep_ratio=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
train_dataloader = dict(dataset=dict(**data, pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(**data, pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file="data/garments/annotations/instances_validation.json")
test_evaluator = val_evaluator

optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=0.2))))
train_cfg = dict(max_epochs=2, val_interval=2)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type="CosineAnnealingLR", by_epoch=True, begin=0, end=2, eta_min=1e-5, convert_to_iter_based=True),
]
