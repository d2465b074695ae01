# DynamicViT on DeiT-S (2106.02034), README and main.py of raoyongming/DynamicViT@1322e62: 30 epochs from the dense
# weights, which teach too; AdamW at 1e-3 for 8 x 128 pictures, weight decay 0.05, 5 epochs of warm-up. The predictors
# learn at that rate and the rest at a hundredth, after 5 epochs at 0; the class token and the positions stay as they
# are. Norms and biases do not decay, nor do those of the predictors. A moving average of the weights with a momentum
# of 1e-4 is evaluated too.
_base_ = "_base_/imagenet.py"

custom_imports = dict(
    imports=["effvit.dense.openmmlab", "effvit.dense.classifiers", "effvit.dense.learnt_pruning"],
    allow_failed_imports=False,
)

model = dict(
    type="DynamicViTClassifier",
    model_name="dynamicvit_deit_small_patch16_224",
    keep_rate=0.7,
    teacher=dict(model_name="deit_small_patch16_224", pretrained=True),
    ratio_weight=2.0,
    distill_weight=0.5,
    token_weight=0.5,
)
optim_wrapper = dict(
    optimizer=dict(lr=1e-5),  # the hundredth: a key for all but the predictors would let norms and biases decay
    paramwise_cfg=dict(
        custom_keys={
            "reducer.predictor": dict(lr_mult=100.0),
            "predictor.in_conv.0.": dict(lr_mult=100.0, decay_mult=0.0),  # LayerNorm
            "predictor.in_conv.1.bias": dict(lr_mult=100.0, decay_mult=0.0),
            "predictor.out_conv.0.bias": dict(lr_mult=100.0, decay_mult=0.0),
            "predictor.out_conv.2.bias": dict(lr_mult=100.0, decay_mult=0.0),
            "predictor.out_conv.4.bias": dict(lr_mult=100.0, decay_mult=0.0),
            "model.cls_token": dict(lr_mult=0.0, decay_mult=0.0),
            "model.pos_embed": dict(lr_mult=0.0, decay_mult=0.0),
        }
    ),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=True, end=5, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min_ratio=1e-3, by_epoch=True, begin=5),
]
train_cfg = dict(max_epochs=30)
custom_hooks = [
    dict(type="PredictorsFirstHook", epochs=5),
    dict(type="EMAHook", momentum=1e-4, priority="ABOVE_NORMAL"),
]
