# GTP (2311.03035).
_base_ = "_base_/finetune.py"

model = dict(model_name="gtp_deit_tiny_patch16_224", num_prop=3)
