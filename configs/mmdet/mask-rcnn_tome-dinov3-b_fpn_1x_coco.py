# ToMe (2210.09461) merges 13 of 196 patches of ViT-B in every block, 6.6 %: here 278 of some 4200.
_base_ = "mask-rcnn_dinov3-b_fpn_1x_coco.py"

model = dict(backbone=dict(sparsify=dict(method="tome", r=278)))
