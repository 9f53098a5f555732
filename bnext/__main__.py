"""``python -m bnext``: what was built, what it runs on, and which kernels a shape gets."""

import argparse

import torch

from bnext._diagnostics import build_report, explain

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


def parse_shape(text: str) -> tuple[int, ...]:
    """``"32,64,56,56"`` as a tuple of four sizes."""
    try:
        shape = tuple(int(size) for size in text.split(","))
    except ValueError:
        shape = ()
    if len(shape) != 4 or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"should be N,C,H,W, such as 32,64,56,56, not {text!r}")
    return shape


def main() -> None:
    """Print the build report and, if asked, what a shape gets."""
    parser = argparse.ArgumentParser(prog="python -m bnext", description=__doc__)
    parser.add_argument("--explain", metavar="N,C,H,W", type=parse_shape, help="a shape to explain")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--layout", choices=LAYOUTS, default="nchw")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    print(build_report())
    if arguments.explain:
        try:
            x = torch.empty(
                arguments.explain,
                dtype=DTYPES[arguments.dtype],
                device=arguments.device,
                memory_format=LAYOUTS[arguments.layout],
            )
            print(explain(x))
        except (RuntimeError, AssertionError) as error:  # torch asserts that it has CUDA
            parser.error(str(error))


if __name__ == "__main__":
    main()
