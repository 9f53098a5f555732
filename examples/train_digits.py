"""The demo: a small residual CNN learns handwritten digits with nn.BatchNorm2d and with bnext.

It compares the results, the derivative of one layer and the time, and saves a plot. Results that
disagree make it fail; times are only reported.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

# Read when torch loads its thread pool: threads that have to wait sleep instead of spinning. On a
# machine shared with other work, spinning made this demo eight times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
try:
    import matplotlib
    import torch
    import torch.nn.functional as F
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    from torch import Tensor, nn
    from tqdm import tqdm
except ModuleNotFoundError as error:
    sys.exit(
        f"The demo needs a package that is missing: {error.name}. Install what it needs with\n"
        "  python -m pip install torch scikit-learn matplotlib tqdm"
    )
try:
    import bnext
except ImportError as error:
    sys.exit(f"bnext cannot be imported: {error}. `make demo` builds it and starts this demo.")

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # after the choice of the backend

NN, BNEXT, NUDGED = "nn.BatchNorm2d", "bnext", "nudged"
BATCH, WIDTH, LEARNING_RATE = 64, 16, 0.1
DERIVED_LAYER = "blocks.1.norm2"
FLOAT64_STEPS = 10
Clock = Callable[[], float]
# Rounds that are not counted: allocators and caches warm up.
WARMUP = 3


class Block(nn.Module):
    """Two 3x3 convolutions with batch-norm and a shortcut around them."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            conv = nn.Conv2d(channels_in, channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class Net(nn.Module):
    """The residual CNN: (N, 1, H, W) images to (N, 10) logits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, WIDTH, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(WIDTH)
        sizes = [(WIDTH, WIDTH, 1), (WIDTH, 2 * WIDTH, 2), (2 * WIDTH, 4 * WIDTH, 2)]
        self.blocks = nn.Sequential(*(Block(*size) for size in sizes))
        self.head = nn.Linear(4 * WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.norm(self.stem(x))))
        return self.head(x.mean((2, 3)))


class Digits(NamedTuple):
    """The normalised images and their labels, on the device; `batches` are indices, in order."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    batches: list[Tensor]


@dataclass
class History:
    """What one model did: the loss of every step, loss and test accuracy of every epoch."""

    losses: list[float] = field(default_factory=list)
    epoch_loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)


class Trainer:
    """A model with its optimizer (SGD with momentum, one-cycle schedule)."""

    def __init__(self, model: nn.Module, steps: int) -> None:
        self.model = model
        self.optimizer = torch.optim.SGD(
            model.parameters(), LEARNING_RATE, momentum=0.9, weight_decay=5e-4, nesterov=True
        )
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, LEARNING_RATE, total_steps=steps
        )

    def step(self, x: Tensor, y: Tensor) -> float:
        """Take one training step and return its loss."""
        loss = F.cross_entropy(self.model(x), y)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return loss.item()

    def accuracy(self, data: Digits) -> float:
        """Return the share of the test images that the model, in eval mode, names rightly."""
        self.model.eval()
        with torch.no_grad():
            right = (self.model(data.test_x).argmax(1) == data.test_y).float().mean().item()
        self.model.train()
        return right


def load(seed: int, epochs: int, scale: int, device: torch.device) -> Digits:
    """Load the 8x8 digits, enlarge and split them 3:1, normalise by the training part."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None]
    images = F.interpolate(images, scale_factor=scale, mode="bilinear", align_corners=False)
    labels = torch.tensor(digits.target, dtype=torch.int64)
    train, test = train_test_split(
        range(len(labels)), test_size=0.25, stratify=digits.target, random_state=seed
    )
    images = ((images - images[train].mean()) / images[train].std()).to(device)
    labels = labels.to(device)
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(train), generator=generator).to(device) for _ in range(epochs)]
    batches = [batch for order in orders for batch in order.split(BATCH) if len(batch) == BATCH]
    return Digits(images[train], labels[train], images[test], labels[test], batches)


def twins(seed: int, device: torch.device, dtype: torch.dtype) -> dict[str, nn.Module]:
    """Build one model twice, the second one converted to bnext: equal initial weights."""
    torch.manual_seed(seed)
    model = Net().to(device, dtype)
    return {NN: model, BNEXT: bnext.convert(copy.deepcopy(model))}


def train(models: dict[str, nn.Module], data: Digits, epochs: int) -> dict[str, History]:
    """Train all models side by side, every batch by each of them in turn."""
    trainers = {name: Trainer(model, len(data.batches)) for name, model in models.items()}
    history = {name: History() for name in models}
    per_epoch = len(data.batches) // epochs
    every = 0.3 if sys.stdout.isatty() else 5.0
    bar = tqdm(data.batches, "training", ncols=88, mininterval=every, file=sys.stdout)
    for step, batch in enumerate(bar, 1):
        x, y = data.train_x[batch], data.train_y[batch]
        for name in models:
            history[name].losses.append(trainers[name].step(x, y))
        if step % per_epoch == 0:
            for name, record in history.items():
                record.epoch_loss.append(statistics.fmean(record.losses[-per_epoch:]))
                record.accuracy.append(trainers[name].accuracy(data))
        losses = f"loss {history[NN].losses[-1]:.4f} {history[BNEXT].losses[-1]:.4f}"
        bar.set_postfix_str(losses, refresh=False)
    return history


def heading(text: str) -> None:
    """Print the title of a section."""
    print(f"\n{text}\n{'-' * len(text)}")


def print_history(history: dict[str, History]) -> None:
    """Print losses and accuracies of both models, epoch by epoch."""
    a, b = history[NN], history[BNEXT]
    print(f"\n{'':5}{'mean training loss':^36}   {'test accuracy':^26}")
    print(f"{'epoch':<5}{NN:>16}{'bnext':>10}{'diff':>10}   {NN:>16}{'bnext':>10}")
    rows = zip(a.epoch_loss, b.epoch_loss, a.accuracy, b.accuracy, strict=True)
    for epoch, (loss_a, loss_b, right_a, right_b) in enumerate(rows, 1):
        losses = f"{epoch:>5}{loss_a:>16.5f}{loss_b:>10.5f}{loss_b - loss_a:>+10.1e}"
        print(f"{losses}   {right_a:>16.2%}{right_b:>10.2%}")


def check_training(history: dict[str, History], data: Digits, seed: int, epochs: int) -> list[str]:
    """Compare the losses where rounding alone may differ; return what disagrees."""
    models = twins(seed, data.train_x.device, torch.float64)
    batches = data.batches[:FLOAT64_STEPS]
    losses = []
    for model in models.values():
        trainer = Trainer(model, len(batches) + 1)
        losses.append([trainer.step(data.train_x[i].double(), data.train_y[i]) for i in batches])
    differences = torch.tensor(losses, dtype=torch.float64).diff(dim=0).abs()
    num_norms = sum(isinstance(layer, nn.BatchNorm2d) for layer in models[NN].modules())
    # Each batch-norm may round its output, of variance 1, differently by up to 8 u. The next one
    # normalises again, so the shares of the layers add up instead of multiplying, and cross-entropy
    # changes by at most twice the change of a logit.
    units = 2 * 8 * num_norms
    # Training amplifies rounding by an amount that nobody knows beforehand. sqrt(u) leaves half of
    # the digits of float64 for it and is still far below what a wrong term in a gradient does.
    rows = [
        ("step 1, float32", abs(history[BNEXT].losses[0] - history[NN].losses[0]), units * 2**-24),
        ("step 1, float64", differences[0, 0].item(), units * 2**-53),
        (f"steps 1 to {len(batches)}, float64", differences.max().item(), 2**-26.5),
    ]
    print(f"\n{'loss, bnext against nn.BatchNorm2d':<38}{'largest difference':>18}{'allowed':>12}")
    failures = []
    for label, value, allowed in rows:
        print(f"  {label:<36}{value:>18.1e}{allowed:>12.1e}")
        if not value <= allowed:
            failures.append(f"{label}: the losses differ by {value:.1e}, allowed {allowed:.1e}")
    drift = {
        name: max(abs(a - b) for a, b in zip(history[NN].losses, record.losses, strict=True))
        for name, record in history.items()
    }
    print(f"  {'all steps, float32':<36}{drift[BNEXT]:>18.1e}{'-':>12}")
    print(f"  {'the same for nudged nn.BatchNorm2d':<36}{drift[NUDGED]:>18.1e}{'-':>12}")
    print(
        f"Allowed: 16 u for each of {num_norms} layers in step 1, then sqrt(u); u = 2^-24, 2^-53.\n"
        "Training amplifies any rounding, so no bar holds for all steps in float32: nudged is the\n"
        "nn.BatchNorm2d model itself, one of its weights changed in the last bit."
    )
    required = 0.97 if epochs >= 8 else 0.85 if epochs >= 4 else 0.0
    bar = f"at least {required:.0%}" if required else "no bar"
    print(f"Required of the final test accuracy of both (--epochs {epochs}): {bar}.")
    for name in (NN, BNEXT):
        reached = history[name].accuracy[-1]
        if reached < required:
            failures.append(f"{name}: final test accuracy {reached:.2%}, required {required:.0%}")
    return failures


class Captured(NamedTuple):
    """A batch-norm layer of the model, its input, and autograd's gradients around it."""

    layer: nn.BatchNorm2d
    x: Tensor
    dy: Tensor
    dx: Tensor


def capture(model: nn.Module, data: Digits) -> dict[str, Captured]:
    """Record what every batch-norm layer gets in one forward and backward pass, by hooks."""
    inputs: dict[nn.Module, Tensor] = {}
    gradients: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def on_forward(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        inputs[layer] = args[0].detach()

    def on_backward(layer: nn.Module, dx: tuple[Tensor, ...], dy: tuple[Tensor, ...]) -> None:
        gradients[layer] = (dy[0].detach(), dx[0].detach())

    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    handles = [layer.register_forward_hook(on_forward) for layer in layers.values()]
    handles += [layer.register_full_backward_hook(on_backward) for layer in layers.values()]
    model.zero_grad(set_to_none=True)
    batch = data.batches[0]
    F.cross_entropy(model(data.train_x[batch]), data.train_y[batch]).backward()
    for handle in handles:
        handle.remove()
    return {name: Captured(m, inputs[m], *gradients[m]) for name, m in layers.items()}


def by_formula(layer: nn.BatchNorm2d, x: Tensor, dy: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Let autograd differentiate the paper's forward with mean and var as nodes of their own.

    dL/dmean is the whole derivative, for var depends on mean.
    """
    dims, shape = (0, 2, 3), (1, -1, 1, 1)
    x, weight, bias = (t.detach().to(dtype).requires_grad_() for t in (x, layer.weight, layer.bias))
    mean = x.mean(dims)
    var = (x - mean.view(shape)).square().mean(dims)
    x_hat = (x - mean.view(shape)) / (var + layer.eps).sqrt().view(shape)
    y = x_hat * weight.view(shape) + bias.view(shape)
    return list(torch.autograd.grad(y, (x, weight, bias, mean, var), dy.to(dtype)))


def allowed_errors(layer: nn.BatchNorm2d, x: Tensor, dy: Tensor) -> list[Tensor]:
    """Bound the error of each float32 gradient by a multiple of the sum of its absolute terms."""
    dims, shape, m = (0, 2, 3), (1, -1, 1, 1), x.numel() / x.shape[1]
    xmu = (x.double() - x.double().mean(dims, keepdim=True)).abs()
    dy, weight = dy.double().abs(), layer.weight.detach().double().abs()
    invstd = (xmu.square().mean(dims) + layer.eps).rsqrt()
    x_hat = xmu * invstd.view(shape)
    dweight, dbias = (dy * x_hat).sum(dims), dy.sum(dims)
    dvar = 0.5 * weight * invstd**2 * dweight
    dmean = weight * invstd * dbias + 2 * dvar * xmu.mean(dims)
    dx = dy + dbias.view(shape) / m + x_hat * dweight.view(shape) / m
    dx = dx * (weight * invstd).view(shape)
    # One dx: 8 u for its terms and 1 u for the result. A sum over a channel: 2e-6; the last two
    # multiply such a sum by powers of invstd and get as much again for them.
    return [9 * 2**-24 * dx, 2e-6 * dweight, 2e-6 * dbias, 4e-6 * dmean, 4e-6 * dvar]


def compare_layer(record: Captured) -> list[str]:
    """Print five derivatives of one layer by bnext and by autograd; return what disagrees."""
    layer, x, dy, dx = record
    ours = bnext.layer_gradients(layer, x, dy)
    theirs = [dx, layer.weight.grad, layer.bias.grad, *by_formula(layer, x, dy, x.dtype)[3:]]
    exact = by_formula(layer, x, dy, torch.float64)
    heading(f"2. The derivative of one layer: {DERIVED_LAYER}, input {list(x.shape)}")
    print("bnext.layer_gradients(layer, input, grad_output) against autograd, after training\n")
    print(f"{'':24}{'largest':>10}{'bnext -':>11}{'share of':>10}{'error against float64':>25}")
    print(f"{'':24}{'value':>10}{'autograd':>11}{'allowed':>10}{'bnext':>14}{'autograd':>11}")
    failures = []
    labels = ["dL/dx", "dL/dgamma", "dL/dbeta", "dL/dmean (by formula)", "dL/dvar  (by formula)"]
    bounds = allowed_errors(layer, x, dy)
    for label, a, b, true, bound in zip(labels, ours, theirs, exact, bounds, strict=True):
        difference = (a.double() - b.double()).abs()
        # Both are float32 results: they may differ by twice what each of them may err.
        share = (difference / (2 * bound)).max().item()
        numbers = f"{true.abs().max().item():>10.2e}{difference.max().item():>11.1e}{share:>10.1%}"
        errors = [(gradient.double() - true).abs().max().item() for gradient in (a, b)]
        print(f"{label:<24}{numbers}{errors[0]:>14.1e}{errors[1]:>11.1e}")
        if not share <= 1:
            failures.append(f"{label} of {DERIVED_LAYER}: {share:.1f} x the allowed difference")
    print(
        "By formula: autograd of the layer has no dL/dmean and dL/dvar, so it differentiates the\n"
        "forward written out, with mean and var as nodes. Allowed: 2 x 9 u (dx), 2e-6 (dgamma,\n"
        "dbeta) or 4e-6 (dmean, dvar) of the sum of the absolute terms, u = 2^-24."
    )
    return failures


def replay(layers: list[nn.Module], records: list[Captured], clock: Clock) -> tuple[float, float]:
    """Run all layers forward, then backward; return the milliseconds of both parts."""
    inputs = [record.x.detach().requires_grad_() for record in records]
    wanted = inputs + [parameter for layer in layers for parameter in layer.parameters()]
    start = clock()
    outputs = [layer(x) for layer, x in zip(layers, inputs, strict=True)]
    middle = clock()
    torch.autograd.grad(outputs, wanted, [record.dy for record in records])
    return middle - start, clock() - middle


def compare_time(
    models: dict[str, nn.Module], records: list[Captured], data: Digits, rounds: int
) -> None:
    """Print the time in batch-norm and in whole training steps."""

    def clock() -> float:
        if data.train_x.is_cuda:
            torch.cuda.synchronize(data.train_x.device)
        return 1e3 * time.perf_counter()

    layers = {NN: [copy.deepcopy(record.layer) for record in records]}
    layers[BNEXT] = [bnext.convert(copy.deepcopy(record.layer)) for record in records]
    trainers = {name: Trainer(copy.deepcopy(models[name]), WARMUP + rounds) for name in layers}
    x, y = data.train_x[data.batches[0]], data.train_y[data.batches[0]]
    times: dict[str, list[tuple[float, ...]]] = {NN: [], BNEXT: []}
    for index in range(WARMUP + rounds):
        for name in (NN, BNEXT) if index % 2 else (BNEXT, NN):
            forward, backward = replay(layers[name], records, clock)
            start = clock()
            trainers[name].step(x, y)
            step = clock() - start
            both = forward + backward
            times[name].append((forward, backward, both, step, 100 * both / step))
    heading("3. The time in batch-norm, per training step")
    print(f"{'milliseconds, median':<26}{NN:>16}{'bnext':>10}{'bnext / nn: median (p20-p80)':>34}")
    labels = [
        "batch-norm forward",
        "batch-norm backward",
        "batch-norm, both",
        "whole training step",
    ]
    columns = [list(zip(*times[name][WARMUP:], strict=True)) for name in (NN, BNEXT)]
    for label, a, b in zip([*labels, "batch-norm in the step, %"], *columns, strict=True):
        ratios = [ours / theirs for theirs, ours in zip(a, b, strict=True)]
        low, *_, high = statistics.quantiles(ratios, n=5)
        ratio = f"{statistics.median(ratios):.2f} ({low:.2f}-{high:.2f})"
        print(f"{label:<26}{statistics.median(a):>16.2f}{statistics.median(b):>10.2f}{ratio:>34}")
    print(
        f"Measured: inputs and gradients of all {len(records)} layers are recorded in one step; a\n"
        "round replays them forward and backward, then takes a whole step, with nn and bnext in\n"
        f"turn; {rounds} rounds, ratios round by round. It holds for this machine and model."
    )


def save_plot(history: dict[str, History], path: Path) -> None:
    """Draw losses, their differences and test accuracies."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    styles = {
        NN: {"label": NN, "color": "#f0a030", "lw": 4, "alpha": 0.8},
        NUDGED: {"label": "nn.BatchNorm2d, nudged", "color": "#888888", "lw": 2.4, "ls": ":"},
        BNEXT: {"label": BNEXT, "color": "#143c78", "lw": 1.2},
    }
    for name, style in styles.items():
        losses, percent = history[name].losses, [100 * a for a in history[name].accuracy]
        right.plot(range(1, len(percent) + 1), percent, marker="o", **style)
        if name != NUDGED:
            left.semilogy(range(1, len(losses) + 1), losses, **style)
        if name != NN:
            pairs = zip(history[NN].losses, losses, strict=True)
            # A log axis has no zero: equal losses are drawn at the bottom.
            differences = [max(abs(a - b), 2**-27) for a, b in pairs]
            middle.semilogy(range(1, len(losses) + 1), differences, **style)
    left.set(title="Training loss", xlabel="step", ylabel="cross-entropy")
    middle.set(title="Loss differs from nn.BatchNorm2d's by", xlabel="step")
    right.set(title="Test accuracy, %", xlabel="epoch")
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def pick_device(name: str) -> torch.device:
    """Return the device asked for; auto is CUDA where torch and bnext both have it."""
    wanted = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        device = torch.device(wanted)
        bnext.batchnorm2d(torch.zeros(2, 1, 2, 2, device=device), training=True).sum().item()
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        if name != "auto" or wanted == "cpu":
            sys.exit(f"--device {name} cannot be used: {reason}")
        print(f"torch has CUDA but bnext does not run there ({reason}): running on the CPU.")
        device = torch.device("cpu")
    # TF32 convolutions would turn one rounding of float32 into a difference of 2^-11.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    return device


def parse_arguments() -> argparse.Namespace:
    """Read the command line; refuse now what would fail after the training."""
    parser = argparse.ArgumentParser(description=__doc__)
    output = Path(__file__).parent / "output" / "train_digits.png"
    parser.add_argument("--epochs", type=int, help="default 8, with --quick 4")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, ...")
    parser.add_argument(
        "--seed", type=int, default=0, help="of weights, batches, split (default 0)"
    )
    parser.add_argument(
        "--output", type=Path, default=output, help="the plot (default %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="smaller images and fewer epochs")
    args = parser.parse_args()
    if args.epochs is None:
        args.epochs = 4 if args.quick else 8
    if args.epochs < 1:
        parser.error("--epochs must be at least 1")
    if args.output.suffix not in (".png", ".svg", ".pdf"):
        parser.error(f"--output must end in .png, .svg or .pdf, not {args.output.name}")
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--output: {error}")
    return args


def main() -> int:
    """Run the demo; return 0 when all results agree."""
    args = parse_arguments()
    device = pick_device(args.device)
    data = load(args.seed, args.epochs, 2 if args.quick else 3, device)
    models = twins(args.seed, device, torch.float32)
    models[NUDGED] = copy.deepcopy(models[NN])
    with torch.no_grad():
        weight = models[NUDGED].stem.weight.view(-1)
        weight[0] = torch.nextafter(weight[0], weight[0] + 1)
    on_cpu = f"CPU, {torch.get_num_threads()} threads"
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else on_cpu
    print(f"bnext {bnext.__version__}, torch {torch.__version__}, {where}, seed {args.seed}")
    print(
        f"{len(data.train_x)} digits of {data.train_x.shape[3]}x{data.train_x.shape[2]} pixels to "
        f"train, {len(data.test_x)} to test; batches of {BATCH}"
    )
    heading("1. A residual CNN, with nn.BatchNorm2d and with bnext: same weights, same batches")
    history = train(models, data, args.epochs)
    print_history(history)
    failures = check_training(history, data, args.seed, args.epochs)
    captured = capture(models[NN], data)
    failures += compare_layer(captured[DERIVED_LAYER])
    compare_time(models, list(captured.values()), data, 15 if args.quick else 40)
    save_plot(history, args.output)
    print(f"\nplot: {args.output}")
    if failures:
        print("FAILED: bnext and nn.BatchNorm2d disagree\n  " + "\n  ".join(failures))
        return 1
    print("All results agree within what is allowed.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
