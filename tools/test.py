"""``effvit test`` from a checkout, whose ``tools/`` configs may import.

python tools/test.py configs/mmdet/garments/mask-rcnn_evit-nano.py work_dirs/mask-rcnn_evit-nano/epoch_2.pth
python tools/test.py configs/mmpretrain/gtp-deit-b_in1k.py
"""

import sys

from effvit.cli import main

if __name__ == "__main__":
    sys.exit(main(["test", *sys.argv[1:]]))
