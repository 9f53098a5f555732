"""In forked processes, after use on several threads in the parent. Each run has a time limit: what
breaks here hangs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 120  # seconds; a run takes about five, most of them for importing torch

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")

# step() is forward and backward of a tensor that is large enough for every thread.
PROGRAM = """
import os, sys, torch, bnext

torch.manual_seed(0)
x = torch.randn(4, 64, 24, 24, requires_grad=True)

def step(x=x):
    y = bnext.batchnorm2d(x, training=True)
    return [y.detach(), *torch.autograd.grad(y, x, x.detach())]

def same(got, want):
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))

def in_child(check):
    pid = os.fork()
    if pid == 0:
        os._exit(0 if check() else 1)
    assert os.waitpid(pid, 0)[1] == 0

torch.set_num_threads(2)
want = step()
"""
PROGRAMS = {
    "one thread in the child": """
def check():
    torch.set_num_threads(1)
    return same(step(), want)
in_child(check)
assert same(step(), want)
""",
    "threads as in the parent": """
def check():
    # Asks for no gradient engine and no other operator: they would wait for torch's threads.
    y = bnext.batchnorm2d(x.detach(), training=True)
    dx = bnext.batchnorm2d_backward(x.detach(), x.detach(), training=True)[0]
    torch.set_num_threads(1)
    return same((y, dx), want)
in_child(check)
in_child(lambda: (in_child(check), True)[1])
assert same(step(), want)
""",
    "data loader": """
class Batches(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, index):
        return step()
loader = torch.utils.data.DataLoader(
    Batches(), batch_size=None, num_workers=2, multiprocessing_context="fork"
)
for epoch in range(2):
    assert all(same(got, want) for got in loader)
    assert same(step(), want)
""",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_forked(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM + PROGRAMS[name]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
