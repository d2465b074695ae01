# CIFAR-10 as `python tools/get_data.py cifar10` unpacks it; link or copy it to data/cifar10. The small ViT of
# Fashion-MNIST on colour pictures of 32 x 32, from random weights, as long as two cores allow: our choice.
_base_ = "../fashion-mnist/_base_/three-epochs.py"

model = dict(
    img_size=32,
    in_chans=3,
    data_preprocessor=dict(mean=[125.31, 122.95, 113.87], std=[62.99, 62.09, 66.70], to_rgb=True),
)

train_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type="CustomDataset",
        data_prefix="data/cifar10/train",
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="RandomCrop", crop_size=32, padding=4),
            dict(type="RandomFlip", prob=0.5),
            dict(type="PackInputs"),
        ],
    ),
)
val_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type="CustomDataset",
        data_prefix="data/cifar10/test",
        pipeline=[dict(type="LoadImageFromFile"), dict(type="PackInputs")],
    ),
)
test_dataloader = val_dataloader

train_cfg = dict(val_interval=1)
