# ToMe (2210.09461), merging to half of the patches by the last block, our choice: a merged token has one feature to give.
_base_ = "_base_/mask-rcnn_garments.py"

model = dict(backbone=dict(sparsify=dict(method="tome", r=16)))
