# Expedite (2210.01035) with the defaults of its code, which are for SAM: the third block and all behind it see 51 % as
# many clusters as patches, 36 x 60 of 50 x 84.
_base_ = "retinanet_dinov3-b_fpn_1x_coco.py"

model = dict(backbone=dict(sparsify=dict(method="expedite")))
