# MCTF (2403.10030), learning from itself with fewer tokens fused; weights of its README, r is ours for 49 patches.
_base_ = "_base_/finetune.py"

custom_imports = dict(
    imports=["effvit.dense.openmmlab", "effvit.dense.consistency_classifier"], allow_failed_imports=False
)

model = dict(type="ConsistencyClassifier", sparsify=dict(method="mctf", r=4), teacher_limit=2)
