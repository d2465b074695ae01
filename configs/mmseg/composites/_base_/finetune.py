# The trained segmenter of upernet_vit.py learns on with a method in its backbone, for a quarter of the iterations at a
# tenth of the learning rate, our choice. Seeds differ in the order and crops of the images. The leaf names the method.
_base_ = "../upernet_vit.py"

load_from = "work_dirs/upernet_vit/iter_2000.pth"  # python tools/train.py configs/mmseg/composites/upernet_vit.py
train_cfg = dict(max_iters=500, val_interval=500)
optim_wrapper = dict(optimizer=dict(lr=1e-4))
param_scheduler = [dict(type="CosineAnnealingLR", by_epoch=False, begin=0, end=500, eta_min=1e-6)]
