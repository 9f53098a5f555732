"""cuDNN's graph API (the package nvidia-cudnn-frontend) on the tensors of a benchmark.

Graphs are built and planned once per shape and dtype. cuDNN's batch norm of this API takes
channels_last only; for anything else the planning says so, and the row carries the message.
"""

from __future__ import annotations

from typing import Any

import cudnn  # type: ignore[import-not-found]
import torch
from torch import Tensor

from benchmarks.checks import Tensors

_TYPES = {
    torch.float16: cudnn.data_type.HALF,
    torch.bfloat16: cudnn.data_type.BFLOAT16,
    torch.float32: cudnn.data_type.FLOAT,
}


class _Graph:
    """One planned graph: its nodes by name, and a workspace."""

    def __init__(self, dtype: torch.dtype, handle: Any) -> None:
        self.handle = handle
        self.graph = cudnn.pygraph(
            io_data_type=_TYPES[dtype],
            intermediate_data_type=cudnn.data_type.FLOAT,
            compute_data_type=cudnn.data_type.FLOAT,
            handle=handle,
        )
        self.nodes: dict[str, Any] = {}

    def tensor(self, name: str, like: Tensor, by_value: bool = False) -> Any:
        self.nodes[name] = self.graph.tensor(
            name=name,
            dim=list(like.size()),
            stride=list(like.stride()),
            data_type=_TYPES[like.dtype],
            is_pass_by_value=by_value,
        )
        return self.nodes[name]

    def outputs(self, dtype: torch.dtype, **nodes: Any) -> None:
        for name, node in nodes.items():
            node.set_output(True).set_data_type(_TYPES[dtype])
            self.nodes[name] = node

    def plan(self) -> None:
        self.graph.validate()
        self.graph.build_operation_graph()
        self.graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        self.graph.check_support()
        self.graph.build_plans()
        size = max(self.graph.get_workspace_size(), 1)
        self.workspace = torch.empty(size, dtype=torch.uint8, device="cuda")

    def run(self, **tensors: Tensor) -> None:
        cudnn.set_stream(handle=self.handle, stream=torch.cuda.current_stream().cuda_stream)
        pack = {self.nodes[name]: tensor for name, tensor in tensors.items()}
        self.graph.execute(pack, self.workspace, handle=self.handle)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().view(1, -1, 1, 1)


class Graphs:
    """Forward and backward for tensors of one shape, dtype and layout."""

    def __init__(self, t: Tensors, momentum: float, eps: float) -> None:
        self.key = self._key(t)
        self.handle = cudnn.create_handle()
        self.momentum = torch.full((1, 1, 1, 1), momentum)
        self.eps = torch.full((1, 1, 1, 1), eps)
        self._forward: _Graph | None = None
        self._backward: _Graph | None = None

    @staticmethod
    def _key(t: Tensors) -> tuple[Any, ...]:
        return (t.x.shape, t.x.stride(), t.x.dtype)

    def fits(self, t: Tensors) -> bool:
        return self.key == self._key(t)

    def forward(self, t: Tensors) -> tuple[Tensor, ...]:
        x, C = t.x.detach(), t.x.shape[1]
        vectors = {
            "scale": _flat(t.weight),
            "bias": _flat(t.bias),
            "in_mean": _flat(t.running_mean),
            "in_var": _flat(t.running_var),
        }
        if self._forward is None:
            g = _Graph(x.dtype, self.handle)
            nodes = {name: g.tensor(name, tensor) for name, tensor in vectors.items()}
            y, mean, invstd, out_mean, out_var = g.graph.batchnorm(
                name="forward",
                input=g.tensor("x", x),
                scale=nodes["scale"],
                bias=nodes["bias"],
                in_running_mean=nodes["in_mean"],
                in_running_var=nodes["in_var"],
                epsilon=g.tensor("eps", self.eps, by_value=True),
                momentum=g.tensor("momentum", self.momentum, by_value=True),
            )
            g.outputs(x.dtype, y=y)
            g.outputs(torch.float32, mean=mean, invstd=invstd, out_mean=out_mean, out_var=out_var)
            g.plan()
            self._forward = g
        y = torch.empty_like(x)
        mean, invstd = (x.new_empty((1, C, 1, 1), dtype=torch.float32) for _ in range(2))
        self._forward.run(
            x=x,
            y=y,
            mean=mean,
            invstd=invstd,
            eps=self.eps,
            momentum=self.momentum,
            out_mean=vectors["in_mean"],  # updated in place
            out_var=vectors["in_var"],
            **vectors,
        )
        return y, mean, invstd

    def inference(self, t: Tensors) -> tuple[Tensor, ...]:
        raise NotImplementedError("takes 1/sqrt(var + eps), not the variance: another contract")

    def backward(self, t: Tensors, saved: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, dy, scale = t.x.detach(), t.dy, _flat(t.weight)
        given = {"dy": dy, "x": x, "scale": scale, "mean": saved[0], "invstd": saved[1]}
        if self._backward is None:
            g = _Graph(x.dtype, self.handle)
            nodes = {name: g.tensor(name, tensor) for name, tensor in given.items()}
            dx, dweight, dbias = g.graph.batchnorm_backward(
                name="backward",
                grad=nodes["dy"],
                input=nodes["x"],
                scale=nodes["scale"],
                mean=nodes["mean"],
                inv_variance=nodes["invstd"],
            )
            g.outputs(x.dtype, dx=dx)
            g.outputs(torch.float32, dweight=dweight, dbias=dbias)
            g.plan()
            self._backward = g
        dx, dweight, dbias = torch.empty_like(x), torch.empty_like(scale), torch.empty_like(scale)
        self._backward.run(dx=dx, dweight=dweight, dbias=dbias, **given)
        return dx, dweight.view(-1), dbias.view(-1)
