# RetinaNet on a frozen DINOv3 ViT-B/16; all else as for ViT-S.
_base_ = "retinanet_dinov3-s_fpn_1x_coco.py"

model = dict(backbone=dict(model_name="vit_base_patch16_dinov3.lvd1689m"), neck=dict(in_channels=768))
