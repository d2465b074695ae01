"""``effvit train`` from a checkout, whose ``tools/`` configs may import.

python tools/train.py configs/mmdet/garments/mask-rcnn_evit-nano.py
torchrun --nproc-per-node 2 tools/train.py CONFIG --cfg-options train_dataloader.batch_size=4
"""

import sys

from effvit.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
