# TAP and ADL (2303.11126) with the defaults of its code, on the plain ViT: a ToMe that merges nothing is that ViT.
_base_ = "_base_/three-epochs.py"

custom_imports = dict(imports=["effvit.dense.openmmlab", "effvit.dense.robust_classifier"], allow_failed_imports=False)

model = dict(type="RobustClassifier", sparsify=dict(method="tome", r=0), num_scales=4, diversity_weight=1.0)
