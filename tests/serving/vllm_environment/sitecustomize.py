"""Let torchvision's CUDA build be imported beside a CPU build of torch, on machines that only have the former.

timm imports torchvision, but OpenVLA's towers use none of its compiled operators. Where these can't be loaded, its
import fails, since it registers the shapes of two operators that do not exist. They are declared here, without code.
"""

import importlib.abc
import sys


class DeclareOperators(importlib.abc.MetaPathFinder):
    """Finds no module, but acts before torchvision registers the shapes."""

    def find_spec(self, name, path, target=None):
        if name == "torchvision._meta_registrations":
            import torch
            import torchvision.extension

            if not torchvision.extension._has_ops():
                for operator in ("nms", "qnms"):
                    schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                    torch.library.define(f"torchvision::{operator}", schema)
        return None


sys.meta_path.insert(0, DeclareOperators())
