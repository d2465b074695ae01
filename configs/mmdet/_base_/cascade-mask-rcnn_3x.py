# Cascade Mask R-CNN as Swin (2103.14030) and STViT-R (2303.08685) train it: heads of four convolutions and one linear
# layer with batch norm over all processes, boxes by GIoU loss of weight 10 (configs/swin of
# changsn/STViT-R-Object-Detection@8b8eb1e, which are those of Swin).
_base_ = [
    "mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py",
    "mmdet::_base_/default_runtime.py",
    "multiscale_3x.py",
]

custom_imports = dict(imports=["effvit.dense.openmmlab"], allow_failed_imports=False)

box_heads = [
    dict(
        type="ConvFCBBoxHead",
        num_shared_convs=4,
        num_shared_fcs=1,
        in_channels=256,
        conv_out_channels=256,
        fc_out_channels=1024,
        roi_feat_size=7,
        num_classes=80,
        bbox_coder=dict(type="DeltaXYWHBBoxCoder", target_means=[0.0] * 4, target_stds=stds),
        reg_class_agnostic=False,
        reg_decoded_bbox=True,
        norm_cfg=dict(type="SyncBN", requires_grad=True),
        loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
        loss_bbox=dict(type="GIoULoss", loss_weight=10.0),
    )
    for stds in ([0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1], [0.033, 0.033, 0.067, 0.067])
]
model = dict(roi_head=dict(bbox_head=box_heads))
