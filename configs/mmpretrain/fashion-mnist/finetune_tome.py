# ToMe (2210.09461).
_base_ = "_base_/finetune.py"

model = dict(model_name="tome_deit_tiny_patch16_224", r=4)
