# GTP off the shelf on DeiT-S: the command in the README of Ackesnal/GTP-ViT@97a1178.
_base_ = "_base_/off_the_shelf.py"

model = dict(model_name="gtp_deit_small_patch16_224", num_prop=4, sparsity=1.0, alpha=0.1)
