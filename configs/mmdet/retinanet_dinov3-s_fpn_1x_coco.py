# RetinaNet on a frozen DINOv3 ViT-S/16 (2508.10104), by the simple feature pyramid of ViTDet (2203.16527) on its last
# map. The combination is our choice; _base_/frozen_dinov3.py has the sources of its numbers.
_base_ = ["_base_/retinanet_vit.py", "_base_/frozen_dinov3.py"]

model = dict(backbone={{_base_.frozen_dinov3}})
optim_wrapper = {{_base_.frozen_optim_wrapper}}
