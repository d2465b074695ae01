# Dense: the plain ViT that the others are compared with.
_base_ = "_base_/three-epochs.py"
