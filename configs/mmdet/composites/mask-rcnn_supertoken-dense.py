# Dense: all pixels of a stage attend to each other.
_base_ = "mask-rcnn_supertoken.py"

model = dict(backbone=dict(stoken_size=(1, 1, 1, 1)))
