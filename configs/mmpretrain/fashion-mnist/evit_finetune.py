# EViT from the dense weights in the package: the second stage of their training again, at a keep rate of 0.5 from the
# first step. A choice of ours.
_base_ = "vit-nano_second-stage.py"

custom_imports = dict(imports=["effvit.openmmlab", "effvit.classifiers"], allow_failed_imports=False)

model = dict(
    type="EffViTClassifier",
    model_name="vit_nano_patch4_28",
    pretrained=True,
    sparsify=dict(method="evit", keep_rate=0.5),
)
