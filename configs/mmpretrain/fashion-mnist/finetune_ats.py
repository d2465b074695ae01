# ATS (2111.15667).
_base_ = "_base_/finetune.py"

model = dict(model_name="ats_deit_tiny_patch16_224", keep_rate=0.9)
