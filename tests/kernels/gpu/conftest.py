"""Kernels run on a GPU where there is one, else in Triton's interpreter: it must know before triton is imported."""

import importlib.util
import os

import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

if DEVICE.type == "cpu" and HAS_TRITON:
    os.environ["TRITON_INTERPRET"] = "1"
