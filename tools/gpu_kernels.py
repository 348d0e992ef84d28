"""Runs every GPU kernel on small, awkward shapes, for compute-sanitizer; checks the results too."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

from torch_fused.selfcheck import CHECKS

for check in CHECKS.values():
    check("cuda")
torch.cuda.synchronize()
print(f"{len(CHECKS)} ops ran")
