# EViT (2202.07800) with the smallest keep rate in the README of its code; its blocks are spread over the eight used
# here.
_base_ = "_base_/mask-rcnn_garments.py"

model = dict(backbone=dict(sparsify=dict(method="evit", keep_rate=0.5, reduce_at=(2, 4, 6))))
