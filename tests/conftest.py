"""Without a GPU the kernels run under Triton's interpreter, which it must know before it is first imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
