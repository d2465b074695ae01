# The control: the dense model.
_base_ = "_base_/finetune.py"

model = dict(model_name="deit_tiny_patch16_224")
