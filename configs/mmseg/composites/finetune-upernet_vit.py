# The control: the dense model.
_base_ = "_base_/finetune.py"
