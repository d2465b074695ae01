# MCTF (2403.10030), learning from itself with fewer tokens fused, with the weights of its README.
_base_ = "_base_/finetune.py"

custom_imports = dict(
    imports=["effvit.dense.openmmlab", "effvit.dense.consistency_classifier", "data.mmpretrain_sets"],
    allow_failed_imports=False,
)

model = dict(type="ConsistencyClassifier", sparsify=dict(method="mctf", r=10), teacher_limit=5)
