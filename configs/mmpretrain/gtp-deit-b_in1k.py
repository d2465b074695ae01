# GTP off the shelf on DeiT-B: the row of 8 tokens in the README of Ackesnal/GTP-ViT@97a1178; its model card has the
# others.
_base_ = "_base_/off_the_shelf.py"

model = dict(model_name="gtp_deit_base_patch16_224", num_prop=8, sparsity=0.6, alpha=0.1)
