"""Every fused kernel once, on layers that fit no tile: what the sanitizer watches."""

import torch

from cospadi.backends import BACKENDS, Placement
from cospadi.backends.selftest.examples import example
from cospadi.backends.selftest.products import prepared


def main() -> None:
    """Run the kernels."""
    device = torch.device("cuda", 0)
    for value_dtype in ("bfloat16", "int8"):
        one, backend = example((130, 200, (72, 17, 40)), 0.5, value_dtype, device), BACKENDS.create("cuda")
        for dtype in (torch.bfloat16, torch.float16):
            placement = Placement(device, dtype)
            dictionary, coefficients = prepared(backend, one, placement)
            for n_tokens in (1, 9, 17, 40, 300):
                for member in (None, 1):
                    backend.multiply(dictionary, coefficients, one.inputs(n_tokens, placement), member)
    torch.cuda.synchronize()
    print("all kernels ran")


if __name__ == "__main__":
    main()
