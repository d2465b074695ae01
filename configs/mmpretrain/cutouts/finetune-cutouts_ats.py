# ATS (2111.15667).
_base_ = "_base_/finetune.py"

model = dict(sparsify=dict(method="ats", keep_rate=0.9))
