# finetune_evit.py with the dense model as teacher, weighted and tempered as in DynamicViT (2106.02034).
_base_ = "finetune_evit.py"

model = dict(
    teacher=dict(model_name="vit_nano_patch4_28", pretrained=True),
    distill_weight=0.5,
    temperature=1.0,
)
