# EViT fine-tuned from DeiT-S (2202.07800), finetune.sh of youweiliang/evit@5ca95a7: keep rate 0.7 from the first
# step.
_base_ = "_base_/finetune_30e.py"

model = dict(model_name="evit_deit_small_patch16_224", keep_rate=0.7)
