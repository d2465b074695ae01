# ToMe (2210.09461), merging to half of the patches, our choice: a merged token has one feature to give to all of them.
_base_ = "_base_/mask-rcnn_garments.py"

model = dict(backbone=dict(sparsify=dict(method="tome", r=16)))
