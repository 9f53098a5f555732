"""``python -m bnext``: what was built, what it runs on, and which kernels a shape gets."""

import argparse
import math

import torch

from bnext._diagnostics import build_report, explain
from bnext._extension import _C

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
MOST_ELEMENTS = (2**63 - 1) // 8  # torch counts bytes in int64
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


def parse_shape(text: str) -> tuple[int, ...]:
    """``"32,64,56,56"`` as a tuple of four sizes."""
    try:
        shape = tuple(int(size) for size in text.split(","))
    except ValueError:
        shape = ()
    if len(shape) != 4 or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"should be N,C,H,W, such as 32,64,56,56, not {text!r}")
    if math.prod(shape) > MOST_ELEMENTS:
        raise argparse.ArgumentTypeError(f"{text} has more elements than a tensor can have")
    return shape


def main() -> None:
    """Print the build report and, if asked, what a shape gets."""
    parser = argparse.ArgumentParser(prog="python -m bnext", description=__doc__)
    add = parser.add_argument
    devices = ", ".join(_C.cuda_devices())
    add("--explain", metavar="N,C,H,W", type=parse_shape, help="a shape to explain")
    add("--dtype", choices=DTYPES, default="float32")
    add("--layout", choices=LAYOUTS, default="nchw")
    add(
        "--device",
        help=f"cpu, current (the CUDA device here), cuda:N, or a kind of device: {devices}. "
        "Default: current where there is one, else cpu",
    )
    add("--family", choices=("all", *_C.cuda_families()), help="plan with these CUDA kernels")
    add("--pass", dest="direction", choices=("forward", "backward", "both"), default="both")
    add("--eval", action="store_true", help="in evaluation mode")
    arguments = parser.parse_args()
    try:
        print(build_report())
        if arguments.explain:
            x = torch.empty(
                arguments.explain,
                dtype=DTYPES[arguments.dtype],
                device="meta",
                memory_format=LAYOUTS[arguments.layout],
            )
            device = arguments.device or ("current" if torch.cuda.is_available() else "cpu")
            print(
                explain(
                    x,
                    device,
                    family=arguments.family,
                    direction=arguments.direction,
                    training=not arguments.eval,
                )
            )
    except (RuntimeError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
