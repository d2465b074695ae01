# ATS fine-tuned from DeiT-S (2111.15667) for 30 epochs, as we recall the paper. The repository
# (adaptivetokensampling/ATS@9271257) holds a training loop, but no training configuration: its only one has training
# switched off. So all other settings are those of EViT's fine-tuning.
_base_ = "_base_/finetune_30e.py"

model = dict(model_name="ats_deit_small_patch16_224")
