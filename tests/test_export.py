"""torch.export of training and eval graphs, and AOTInductor packages made of them."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from pathlib import Path

import cases
import pytest
import torch
from test_modules import near, same_state
from torch import Tensor, nn

import bnext
from bnext._extension import _C

OPTIONS = ({}, {"momentum": None}, {"affine": False, "track_running_stats": False})


def model_of(training: bool = False, device: str = "cpu", **options: object) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, **options), nn.ReLU()).double()
    model(images(7))
    return bnext.convert(model).train(training).to(device)


def images(n: int, seed: int = 0) -> Tensor:
    return cases.random_tensor((n, 3, 6, 7), torch.float64, seed, 1.0)


def export(model: nn.Module) -> torch.export.ExportedProgram:
    """For any batch size."""
    batch = torch.export.Dim("batch", min=2, max=64)
    x = images(3).to(model[0].weight.device)
    return torch.export.export(model, (x,), dynamic_shapes=({0: batch},))


def targets(program: torch.export.ExportedProgram) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_export(options: dict, training: bool, device: str) -> None:
    """One operator in the graph; other batch sizes, gradients, statistics, and through a file."""
    eager = model_of(training, device, **options)
    program = export(copy.deepcopy(eager))
    assert targets(program).count("bnext.batchnorm2d.default") == 1
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for exported in (program.module(), torch.export.load(file).module()):
        expected = copy.deepcopy(eager)
        for number in range(2):
            gradients = []
            for model in (exported, expected):
                x = images(5 + number, number).to(device).requires_grad_()
                model.zero_grad()
                model(x).square().sum().backward()
                gradients.append([x.grad, *(p.grad for p in model.parameters())])
            for a, b in zip(*gradients, strict=True):
                near(a, b)
        for name, buffer in expected.named_buffers():
            near(exported.get_buffer(name), buffer)


@pytest.mark.parametrize("training", [True, False])
def test_decompositions_leave_an_operator_of_cpp(training: bool) -> None:
    """Broken down, a program holds the kernel's own operator, and writes to the statistics."""
    eager = model_of(training)
    program = export(copy.deepcopy(eager)).run_decompositions()
    assert "bnext.batchnorm2d.default" not in targets(program)
    name = "bnext.batchnorm2d_forward" if training else "bnext.batchnorm2d_eval"
    calls = [n for n in program.graph.nodes if n.op == "call_function"]
    assert sum(name in str((n.target, n.args[:1])) for n in calls) == 1
    mutated = set(program.graph_signature.buffers_to_mutate.values())
    updated = {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert mutated == (updated if training else set())
    exported = program.module()
    near(exported(images(5)), eager(images(5)))
    same_state(exported, eager)


IMPORT = """
import sys, torch, bnext
path = sys.argv[1]
torch.save(torch._inductor.aoti_load_package(path)(torch.load(path + ".x")), path + ".y")
"""
LOAD = """
import sys, torch
path, library = sys.argv[1:]
try:
    torch._inductor.aoti_load_package(path)
except RuntimeError as error:
    assert "schema for bnext::batchnorm2d_eval" in str(error), error
else:
    raise AssertionError("the operators were not needed")
torch.ops.load_library(library)
package = torch._inductor.aoti_load_package(path)
torch.save(package(torch.load(path + ".x")), path + ".y")
"""


def test_aot_inductor(tmp_path: Path, device: str) -> None:
    """A compiled package of the eval graph, in other processes.

    They have to register the operators: by `import bnext`, or, without its Python, by loading the
    compiled module as a library.
    """
    model = model_of(device=device)
    x = images(5).to(device)
    with torch.no_grad():
        path = torch._inductor.aoti_compile_and_package(
            export(model), package_path=str(tmp_path / "model.pt2")
        )
        want = model(x)
    torch.save(x, f"{path}.x")
    for script in (IMPORT, LOAD):
        command = [sys.executable, "-c", script, path, _C.__file__]
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, f"exit status {run.returncode}\n{run.stderr}"
        near(torch.load(f"{path}.y"), want)
        Path(f"{path}.y").unlink()
