"""Batch norm's derivative written by hand: an attempt, its correction, autograd, and bnext.

The attempt makes the mistakes of a public question, "Derivative of BatchNorm2d in PyTorch". Prints,
for every term, the largest difference from autograd in float64, relative to the largest value of
the term.
"""

import torch
from torch import Tensor, nn

import bnext

CHANNELS = (1, -1, 1, 1)  # how a (C,) tensor meets a (N, C, H, W) one
REDUCED = (0, 2, 3)


def attempt(x: Tensor, y: Tensor, dy: Tensor, layer: nn.BatchNorm2d) -> dict[str, Tensor]:
    """Running statistics, m = N, and dL/dgamma from the output: three mistakes of four."""
    weight, mean, var = (
        t.view(CHANNELS) for t in (layer.weight, layer.running_mean, layer.running_var)
    )
    m = x.shape[0]
    dxhat = dy * weight
    dvar = (-0.5 * dxhat * (x - mean) / (var + layer.eps) ** 1.5).sum(REDUCED, keepdim=True)
    dmean = (-dxhat / (var + layer.eps).sqrt()).sum(REDUCED, keepdim=True)
    dmean = dmean + dvar * (-2 * (x - mean)).sum(REDUCED, keepdim=True) / m
    dx = dxhat / (var + layer.eps).sqrt() + dvar * 2 * (x - mean) / m + dmean / m
    return {"x": dx, "gamma": (dy * y).sum(REDUCED), "beta": dy.sum(REDUCED)}


def correction(x: Tensor, dy: Tensor, layer: nn.BatchNorm2d) -> dict[str, Tensor]:
    """The batch's statistics, m = N*H*W, dL/dgamma from xhat: Ioffe and Szegedy, section 3."""
    weight = layer.weight.view(CHANNELS)
    m = x.numel() / x.shape[1]
    mean = x.mean(REDUCED, keepdim=True)
    var = x.var(REDUCED, unbiased=False, keepdim=True)
    r = (var + layer.eps).rsqrt()
    xhat = (x - mean) * r
    dxhat = dy * weight
    dvar = -0.5 * r**3 * (dxhat * (x - mean)).sum(REDUCED, keepdim=True)
    dmean = -r * dxhat.sum(REDUCED, keepdim=True)
    dmean = dmean - 2 * dvar * (x - mean).sum(REDUCED, keepdim=True) / m
    dx = r * dxhat + dvar * 2 * (x - mean) / m + dmean / m
    gamma, beta = (dy * xhat).sum(REDUCED), dy.sum(REDUCED)
    return {"x": dx, "gamma": gamma, "beta": beta, "mean": dmean.flatten(), "var": dvar.flatten()}


def main() -> None:
    """Compare all ways on one random layer."""
    torch.manual_seed(0)
    layer = nn.BatchNorm2d(5).double()
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    x = (2 * torch.randn(4, 5, 6, 7, dtype=torch.float64) + 1).requires_grad_()
    dy = torch.randn_like(x)
    y = layer(x)
    expected = dict(
        zip(
            ("x", "gamma", "beta"),
            torch.autograd.grad(y, (x, layer.weight, layer.bias), dy),
            strict=True,
        )
    )
    ours = bnext.layer_gradients(layer, x, dy)
    with torch.no_grad():
        ways = {
            "attempt": attempt(x, y, dy, layer),
            "correction": correction(x, dy, layer),
            "bnext": {"x": ours.input, "gamma": ours.weight, "beta": ours.bias},
        }
    print(f"{'difference from autograd':<26}" + "".join(f"{way:>12}" for way in ways))
    for term, value in expected.items():
        errors = [
            float((way[term] - value).abs().max() / value.abs().max()) for way in ways.values()
        ]
        print(f"  dL/d{term:<20}" + "".join(f"{error:>12.1e}" for error in errors))


if __name__ == "__main__":
    main()
