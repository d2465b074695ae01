# Dense DeiT-S (2012.12877), the baseline of the methods on it.
_base_ = "_base_/retinanet_vit.py"
