"""`ops.activations` inside kernels: what a last stage applies before it stores."""

import triton
import triton.language as tl


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """x, in float32, after the activation of that name."""
    if ACTIVATION == "gelu":
        # the normal distribution's log-odds are x times an even function: a fit to 3e-6 of gelu(x), half of erf's work
        t = x * x
        odds = 1.5956551548048177 + t * (0.07293986923777405 + t * (-0.000250959474995745))
        odds += t * t * t * (-6.093273591945931e-05 + t * 2.225153989252403e-06)
        y = x * tl.sigmoid(x * odds)
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(a)) / 2 is the logistic function of 2 a
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "quick_gelu":
        y = x * tl.sigmoid(1.702 * x)
    elif ACTIVATION == "relu":
        y = tl.maximum(x, 0.0)
    elif ACTIVATION == "silu":
        y = x * tl.sigmoid(x)
    else:
        y = x
    return y
