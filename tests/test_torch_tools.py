"""What the rest of torch does with a batch-norm layer: tracing, fusing, quantising, averaging."""

from __future__ import annotations

import copy
import io
import warnings

import cases
import pytest
import torch
from test_conversion import same_step
from test_modules import OPTIONS, near, pair, same_state
from torch import Tensor, nn
from torch.fx.experimental import optimization
from torch.optim import swa_utils
from torch.utils.checkpoint import checkpoint

import bnext

SHAPE = (2, 3, 6, 7)


def model_of(training: bool = True, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """A convolution, batch norm and relu with statistics that are not the initial ones."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).to(dtype)
    model(torch.randn(SHAPE, dtype=dtype))
    return model.train(training)


def images(seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return cases.random_tensor(SHAPE, dtype, seed, 1.0)


def called_modules(graph: torch.fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op == "call_module"]


@pytest.mark.parametrize("training", [True, False])
def test_fx_keeps_the_layer(training: bool) -> None:
    """symbolic_trace sees a batch-norm module, as with torch's, and computes what it computes."""
    theirs = model_of(training)
    ours = bnext.convert(copy.deepcopy(theirs))
    calls = []
    ours[1].register_forward_hook(lambda module, inputs, y: calls.append(1) or 2 * y)
    traced = torch.fx.symbolic_trace(ours)
    assert not calls
    assert called_modules(traced.graph) == called_modules(torch.fx.symbolic_trace(theirs).graph)
    assert isinstance(traced.get_submodule("1"), nn.BatchNorm2d)
    near(traced(images()), 2 * theirs(images()))
    assert len(calls) == 1, "a hook belongs to the layer and runs with it, once"
    again = torch.fx.symbolic_trace(copy.deepcopy(traced))
    assert called_modules(again.graph) == ["0", "1", "2"]


def test_fx_of_one_layer() -> None:
    """As the root it is traced through, as torch's is."""
    layer, _ = pair()
    layer.eval()
    x = cases.random_tensor((2, 5, 3, 3), torch.float64, 0, 1.0)
    assert torch.equal(torch.fx.symbolic_trace(layer)(x), layer(x))


def test_fx_fusion_wants_revert() -> None:
    """torch.fx.experimental.optimization.fuse looks for the exact class: without it, no fusion."""
    model = bnext.convert(model_of(training=False))
    want = model(images())
    assert called_modules(optimization.fuse(model).graph) == ["0", "1", "2"]
    near(optimization.fuse(model)(images()), want)
    fused = optimization.fuse(bnext.revert(model))
    assert called_modules(fused.graph) == ["0", "2"]
    near(fused(images()), want)


def test_fuse_conv_bn_eval() -> None:
    model = bnext.convert(model_of(training=False))
    fused = nn.utils.fusion.fuse_conv_bn_eval(model[0], model[1])
    near(fused(images()), model[1](model[0](images())))


@pytest.fixture
def quantization():
    """torch.ao.quantization with an engine that can run here. It is leaving torch for torchao."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = pytest.importorskip(
            "torch.ao.quantization.quantize_fx", reason="not in this torch"
        )
        if not {"fbgemm", "x86"} & set(torch.backends.quantized.supported_engines):
            pytest.skip("this torch has no quantised kernels for this machine")
        yield module


def test_eager_quantization_wants_revert(quantization) -> None:
    """fuse_modules has a table of exact classes: it says so, and has fused nothing."""
    fuse = torch.ao.quantization.fuse_modules
    model = bnext.convert(model_of(training=False))
    want = model(images())
    with pytest.raises((AssertionError, NotImplementedError), match=r"bnext\.modules\.BatchNorm2d"):
        fuse(model, [["0", "1", "2"]])
    fused = fuse(bnext.revert(model), [["0", "1", "2"]])
    assert type(fused[1]) is nn.Identity
    near(fused(images()), want)


def test_fx_quantization_wants_revert(quantization) -> None:
    """prepare_fx leaves a converted layer in float beside its convolution; reverted, it fuses."""
    mapping = torch.ao.quantization.get_default_qconfig_mapping("fbgemm")
    x = images(dtype=torch.float32)
    want = model_of(training=False, dtype=torch.float32)(x)
    for change, left in ((bnext.convert, 1), (lambda m: bnext.revert(bnext.convert(m)), 0)):
        model = change(model_of(training=False, dtype=torch.float32))
        prepared = quantization.prepare_fx(model, mapping, (x,))
        prepared(x)
        quantised = quantization.convert_fx(prepared)
        layers = [m for m in quantised.modules() if isinstance(m, nn.BatchNorm2d)]
        assert len(layers) == left
        # 8 bits over a range that every calibration value is in: half a step of about range / 127
        # for x, y and each of 27 weights; far above it only if something else is computed.
        torch.testing.assert_close(quantised(x), want, rtol=0, atol=0.1 * want.max().item())


def test_quantization_aware_training(quantization) -> None:
    """Prepared with torch's layers, then converted: the layer inside the fused one is ours."""
    mapping = torch.ao.quantization.get_default_qat_qconfig_mapping("fbgemm")
    x = images(dtype=torch.float32)
    theirs, ours = (
        quantization.prepare_qat_fx(model_of(dtype=torch.float32), mapping, (x,)) for _ in range(2)
    )
    bnext.convert(ours)
    assert sum(type(m) is bnext.BatchNorm2d for m in ours.modules()) == 1
    for model in (ours, theirs):
        model(x).square().mean().backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        # float32 rounds, and a rounding may move a value to the next of 256 quantised ones
        torch.testing.assert_close(a.grad, b.grad, rtol=0.02, atol=0.02)
    quantised = quantization.convert_fx(ours.eval())
    assert not [m for m in quantised.modules() if isinstance(m, nn.BatchNorm2d)]


def test_sync_batchnorm_conversion() -> None:
    """Ours become SyncBatchNorm with the same tensors, as torch's do; convert leaves those be."""
    model = bnext.convert(model_of())
    weight, mean = model[1].weight, model[1].running_mean
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(bnext.convert(synced)[1]) is nn.SyncBatchNorm
    assert synced[1].weight is weight
    assert synced[1].running_mean is mean
    theirs = model_of(training=False)
    near(synced.eval()(images()), theirs(images()))


def test_data_parallel() -> None:
    """Without a GPU it calls the module itself; what it replicates is still ours."""
    model = bnext.convert(model_of())
    near(nn.DataParallel(model, device_ids=[])(images()), model_of()(images()))
    replica = model[1]._replicate_for_data_parallel()
    assert type(replica) is bnext.BatchNorm2d


@pytest.mark.gpu
def test_data_parallel_on_one_gpu() -> None:
    model = bnext.convert(model_of()).cuda()
    wrapped = nn.DataParallel(model, device_ids=[0])
    near(wrapped(images().cuda()), model_of().cuda()(images().cuda()))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_checkpoint(training: bool, reentrant: bool, device: str) -> None:
    """The forward pass runs twice, and the statistics take the batch twice, as with torch's."""
    theirs = model_of(training).to(device)
    ours = bnext.convert(copy.deepcopy(theirs))
    gradients = []
    for model in (ours, theirs):
        x = images().to(device).requires_grad_()
        checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
        gradients.append([x.grad, *(p.grad for p in model.parameters())])
    for a, b in zip(*gradients, strict=True):
        near(a, b)
    same_state(ours, theirs)
    assert ours[1].num_batches_tracked.item() == 1 + 2 * training


def test_averaged_weights(device: str) -> None:
    """EMA of parameters and buffers, and update_bn, which finds layers by class."""
    theirs = model_of().to(device)
    ours = bnext.convert(copy.deepcopy(theirs))
    averaged = []
    for model in (ours, theirs):
        average = swa_utils.AveragedModel(
            model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True
        )
        for number in range(3):
            model(images(number).to(device))
            average.update_parameters(model)
        averaged.append(average)
    same_state(*averaged)
    for average in averaged:
        swa_utils.update_bn([images(number).to(device) for number in range(3)], average)
    assert type(averaged[0].module[1]) is bnext.BatchNorm2d
    assert averaged[0].module[1].num_batches_tracked.item() == 3
    assert averaged[0].module[1].momentum == 0.1
    same_state(*averaged)


@pytest.mark.parametrize("momentum, affine, track", [o for o in OPTIONS if o[0] in (None, 0.1)])
def test_jit_script(momentum: float | None, affine: bool, track: bool) -> None:
    """Scripted, saved, loaded and frozen, with gradients and statistics, beside eager."""
    layer = pair(momentum=momentum, affine=affine, track_running_stats=track)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        for training in (True, False):
            eager, source = (copy.deepcopy(layer).train(training) for _ in range(2))
            scripted = torch.jit.script(source)
            file = io.BytesIO()
            torch.jit.save(scripted, file)
            file.seek(0)
            loaded = torch.jit.load(file)
            for number in range(3):  # the second call is the one that torch.jit optimises
                x = cases.random_tensor((4, 5, 6, 7), torch.float64, number, 1.0)
                for other in (scripted, loaded):
                    same_step(other, copy.deepcopy(eager), x)
                eager(x)
            scripted.train(not training)
            assert torch.equal(scripted(x), eager.train(not training)(x))
        frozen = torch.jit.freeze(torch.jit.script(layer.eval()))
        assert torch.equal(frozen(x), layer(x))


def dtypes_of_a_step(layer: nn.Module, x: Tensor) -> list[torch.dtype] | None:
    """Of output, gradients and buffers; None where torch or we refuse the combination."""
    try:
        y = layer(x)
        y.float().square().sum().backward()
    except RuntimeError:
        return None
    return [t.dtype for t in (y, x.grad, layer.weight.grad, *layer.buffers())]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("module", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_mixed_precision_dtypes(
    module: torch.dtype,
    dtype: torch.dtype,
    autocast: torch.dtype | None,
    training: bool,
    device: str,
) -> None:
    """The dtypes of torch's layer, for every dtype of layer and input, and its refusals."""
    outcomes = []
    for kind in (bnext.BatchNorm2d, nn.BatchNorm2d):
        layer = kind(3, device=device, dtype=module).train(training)
        x = images(dtype=dtype).to(device).requires_grad_()
        with torch.autocast(device, autocast or torch.bfloat16, enabled=autocast is not None):
            outcomes.append(dtypes_of_a_step(layer, x))
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_half_parameters_with_float32_statistics(half: torch.dtype, device: str) -> None:
    """Which torch's kernels for a CPU refuse."""
    layer = bnext.BatchNorm2d(3, device=device, dtype=half)
    layer.running_mean, layer.running_var = layer.running_mean.float(), layer.running_var.float()
    got = dtypes_of_a_step(layer, images(dtype=half).to(device).requires_grad_())
    assert got == [half, half, half, torch.float32, torch.float32, torch.int64]


def test_grad_scaler(device: str) -> None:
    """A step whose gradients overflow is skipped; the next one is not."""
    model = bnext.convert(model_of(dtype=torch.float32)).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(device)
    for factor, steps in ((torch.inf, False), (1.0, True)):
        before = model[1].weight.detach().clone()
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16):
            y = model(images(dtype=torch.float32).to(device))
        scaler.scale(y.float().square().mean() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(model[1].weight, before) != steps
        assert model[1].weight.isfinite().all()


def export_onnx(model: nn.Module) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (images(dtype=torch.float32),), file, dynamo=False)
    return file.getvalue()


def test_onnx_does_not_know_the_operator() -> None:
    with pytest.raises(Exception, match="operator with unrecognized namespace"):
        export_onnx(bnext.convert(model_of(training=False, dtype=torch.float32)))


def test_onnx_wants_revert() -> None:
    pytest.importorskip("onnx", reason="onnx is not installed")
    model = bnext.convert(model_of(training=False, dtype=torch.float32))
    assert export_onnx(bnext.revert(model)) == export_onnx(
        model_of(training=False, dtype=torch.float32)
    )


@pytest.mark.parametrize("training", [True, False])
def test_lazy_clones_stay_lazy(training: bool) -> None:
    """What is only read goes on sharing its memory; what is written parts from its origin."""
    case = cases.make_case(SHAPE, "float32")
    origins = [*case[:5], case.grad_output]
    assert not any(map(torch._C._is_cow_tensor, origins))
    lazy = [torch._lazy_clone(t) for t in origins]
    before = [t.clone() for t in origins]
    x, *rest, dy = lazy
    y = bnext.batchnorm2d(x.requires_grad_(), *rest, training=training)
    y.backward(dy)
    bnext.batchnorm2d_backward(dy, x.detach(), rest[2], *rest[:2], training=training)
    written = lazy[1:3] if training else []
    for t, origin, values in zip(lazy, origins, before, strict=True):
        assert torch._C._is_cow_tensor(t) != any(t is w for w in written)
        assert torch.equal(origin, values)
    assert all(not torch.equal(w, b) for w, b in zip(written, before[1:3], strict=False))


def test_out_may_be_a_lazy_clone() -> None:
    """Of dy or of x: it gets memory of its own."""
    case = cases.make_case(SHAPE, "float32")
    want = bnext.batchnorm2d_backward(case.grad_output, case.input)
    for origin in (case.grad_output, case.input):
        values, out = origin.clone(), torch._lazy_clone(origin)
        got = bnext.batchnorm2d_backward(case.grad_output, case.input, out=out)
        assert got.input is out
        assert all(map(torch.equal, got, want))
        assert torch.equal(origin, values)
