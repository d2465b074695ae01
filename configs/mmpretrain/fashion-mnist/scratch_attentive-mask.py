# Attentive masking (2212.08653) with the ratio of its code, on the plain ViT. Single patches, since 7 x 7 are no
# blocks of 2 x 2; the teacher follows within the three epochs: both our choice.
_base_ = "_base_/three-epochs.py"

custom_imports = dict(imports=["effvit.dense.openmmlab", "effvit.dense.masked_classifier"], allow_failed_imports=False)

model = dict(type="MaskedClassifier", sparsify=dict(method="tome", r=0), ratio=0.5, block=1, momentum=0.99)
