# Patch token contrast (ToCo, 2303.01267) with the weights and thresholds of its VOC script, on the dense model.
_base_ = "_base_/finetune.py"

custom_imports = dict(
    imports=["effvit.dense.openmmlab", "effvit.dense.token_contrast_classifier"], allow_failed_imports=False
)

model = dict(type="TokenContrastClassifier", contrast_weight=0.2)
