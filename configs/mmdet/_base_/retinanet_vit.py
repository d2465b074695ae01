# RetinaNet on a plain ViT: levels of stride 8 to 128 from its last map (ViTDet, 2203.16527, section 3).
_base_ = [
    "mmdet::_base_/models/retinanet_r50_fpn.py",
    "mmdet::_base_/datasets/coco_detection.py",
    "mmdet::_base_/default_runtime.py",
    "vitdet_recipe.py",
]

custom_imports = dict(imports=["effvit.dense.openmmlab"], allow_failed_imports=False)

model = dict(
    backbone={{_base_.vit_backbone}},
    neck=dict(
        _delete_=True,
        type="SimpleFeaturePyramid",
        in_channels=384,
        out_channels=256,
        scales=(2.0, 1.0, 0.5),
        num_outs=5,
    ),
)
