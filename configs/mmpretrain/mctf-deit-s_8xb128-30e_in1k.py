# MCTF on DeiT-S (2403.10030), README and main.py of mlvlab/MCTF@2004da0: r = 16 in all blocks but the first; the model
# learns from itself with an r below 8. 30 epochs from the dense weights and 10 more at the last rate, without warm-up,
# Mixup or CutMix; AdamW at 3e-5, three hundredths of DeiT's rate for 8 x 128 pictures. Otherwise DeiT's recipe.
_base_ = "_base_/deit.py"

custom_imports = dict(
    imports=["effvit.dense.openmmlab", "effvit.dense.classifiers", "effvit.dense.consistency_classifier"],
    allow_failed_imports=False,
)

model = dict(
    type="ConsistencyClassifier",
    model_name="mctf_deit_small_patch16_224",
    pretrained=True,
    teacher_limit=8,
    teacher_weight=1.0,
    consistency_weight=3.0,
    confidence=0.4,
    train_cfg=dict(_delete_=True),
)
optim_wrapper = dict(optimizer=dict(lr=0.03 * 5e-4 * 1024 / 512))
param_scheduler = [dict(type="CosineAnnealingLR", eta_min=1e-6, by_epoch=True, end=30)]
train_cfg = dict(max_epochs=40)
