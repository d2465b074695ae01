# CubistMerge (2509.21764) takes 2 rows and 2 columns of 14 out of the grid before the second block: here 7 of 50, the
# patches along the shorter side of a picture of 800 pixels.
_base_ = "retinanet_dinov3-b_fpn_1x_coco.py"

model = dict(backbone=dict(sparsify=dict(method="cubistmerge", r_h=7, r_w=7)))
