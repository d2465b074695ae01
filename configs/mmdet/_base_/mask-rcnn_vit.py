# Mask R-CNN on a plain ViT: the simple feature pyramid of ViTDet (2203.16527, section 3) in place of the FPN. The
# blocks are the ViT's own, with global attention.
_base_ = [
    "mmdet::_base_/models/mask-rcnn_r50_fpn.py",
    "mmdet::_base_/datasets/coco_instance.py",
    "mmdet::_base_/default_runtime.py",
    "vitdet_recipe.py",
]

custom_imports = dict(imports=["effvit.dense.openmmlab"], allow_failed_imports=False)

model = dict(
    backbone={{_base_.vit_backbone}},
    neck=dict(_delete_=True, type="SimpleFeaturePyramid", in_channels=384, out_channels=256, num_outs=5),
)
