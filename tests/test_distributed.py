"""Two processes over gloo: DistributedDataParallel and fully_shard, beside torch's own layer."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import Replicate, distribute_module, distribute_tensor

import bnext

NUM_PROCESSES = 2

pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()),
    reason="this torch has no gloo",
)


def data_parallel(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def static_graph(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(
        model, static_graph=True, gradient_as_bucket_view=True
    )


def sharded(model: nn.Module) -> nn.Module:
    """Each layer by itself, batch norm too: its class becomes one that fully_shard makes."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (NUM_PROCESSES,))
    for layer in (*model, model):
        fully_shard(layer, mesh=mesh)
    return model


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def train(change: Callable[[nn.Module], nn.Module], wrap: Callable, rank: int) -> list[Tensor]:
    """Parameters, statistics and an eval output after three steps on batches of this rank's own."""
    torch.manual_seed(rank)  # the ranks begin apart; what wraps them makes them equal
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4, momentum=None)
    )
    if wrap is sharded:
        torch.manual_seed(0)
        for layer in model[:2]:
            layer.reset_parameters()
    model = wrap(change(model.double()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    model.eval()
    return [*map(whole, model.parameters()), *model.buffers(), model(x).detach()]


def work(rank: int, folder: str, wraps: tuple[Callable, ...]) -> None:
    """What each process does. Raises where the results differ."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=NUM_PROCESSES
    )
    try:
        for wrap in wraps:
            ours, theirs = train(bnext.convert, wrap, rank), train(lambda m: m, wrap, rank)
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(
                    a, b, rtol=1e-9, atol=1e-9, msg=lambda m, w=wrap: f"{w.__name__}: {m}"
                )
        # The wrappers are in cycles, and hold the group. One that outlives its destruction below
        # ends at exit, where gloo's threads abort the process now and then; so it goes before, and
        # not while the other rank uses it.
        gc.collect()
        distributed.barrier()
    finally:
        distributed.destroy_process_group()


def test_a_dtensor_is_refused(tmp_path: Path) -> None:
    """torch asks the operator how its results are spread over the mesh, and it does not say."""
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        mesh = distributed.init_device_mesh("cpu", (1,))
        layer = distribute_module(bnext.BatchNorm2d(3), mesh)
        x = distribute_tensor(torch.randn(2, 3, 4, 4), mesh, [Replicate()])
        with pytest.raises(NotImplementedError, match="sharding strategy"):
            layer(x)
        assert layer.num_batches_tracked.to_local() == 0
    finally:
        distributed.destroy_process_group()


def test_data_parallel_and_sharded(tmp_path: Path) -> None:
    """The same parameters and statistics on both ranks, gradients reduced, buffers broadcast."""
    torch.multiprocessing.spawn(
        work, (str(tmp_path), (data_parallel, static_graph, sharded)), nprocs=NUM_PROCESSES
    )
