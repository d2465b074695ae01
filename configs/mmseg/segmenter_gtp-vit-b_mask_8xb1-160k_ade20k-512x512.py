# GTP (2311.03035) removes 8 of 196 patches of DeiT-S in every block, 4.1 %: here 42, 4 % of
# some 1024, which leaves enough of elongated pictures.
_base_ = "_base_/segmenter_vit-b.py"

model = dict(backbone=dict(model_name="gtp_vit_base_patch16_224", num_prop=42))
