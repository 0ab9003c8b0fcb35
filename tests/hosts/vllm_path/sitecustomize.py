"""On the path of vLLM's processes: lets torchvision, whose compiled operators no CPU torch loads, be imported.

transformers' Pixtral processor imports it, and vLLM that. Declaring the two operators that it looks up is enough, for
nothing calls them. Python imports this file by itself.
"""

import sys

BOXES = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class BeforeTorchvision:
    """Finds nothing; declares the operators when torchvision is looked for."""

    library = None

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        """None, so that the next finder is asked."""
        if name == "torchvision" and cls.library is None:
            import torch

            cls.library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                cls.library.define(operator + BOXES)


sys.meta_path.insert(0, BeforeTorchvision)
