# ToMe (2210.09461), at about the multiply-adds of mask-rcnn_evit-nano.py.
_base_ = "_base_/mask-rcnn_garments.py"

model = dict(backbone=dict(sparsify=dict(method="tome", r=30)))
