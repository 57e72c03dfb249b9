"""A layer's weight as a parent module reads it: what costs nothing, and that everything else is the weight itself."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from conftest import perturb
from peft import get_peft_model
from torch import nn

from peft_dlqat import DLQATConfig, pack_weights
from peft_dlqat import layer as layer_module
from peft_dlqat.deferred import DeferredWeight
from peft_dlqat.layer import adapter_layers


def deferred(value: torch.Tensor) -> tuple[DeferredWeight, list[torch.Tensor]]:
    """A weight, and a list that grows when it is computed."""
    computed: list[torch.Tensor] = []
    weight = DeferredWeight(lambda: computed.append(value) or value, value.shape, value.dtype, value.device)
    return weight, computed


@pytest.mark.parametrize(
    "read",
    [
        lambda w: (w.shape, w.dtype, w.device, w.ndim, w.is_cuda),
        lambda w: (w.size(), w.size(0), w.dim(), w.numel(), len(w), w.is_floating_point(), w.element_size()),
        lambda w: torch.ones(2, dtype=torch.float64).to(w.dtype).dtype,
    ],
)
def test_what_costs_nothing(read):
    value = torch.randn(3, 4, dtype=torch.bfloat16)
    weight, computed = deferred(value)
    assert read(weight) == read(value)
    assert computed == []


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.mul_(0),
        lambda w: w.data.zero_(),
        lambda w: w.data.data.copy_(torch.ones(3, 4)),
        lambda w: w.__setitem__(0, 1.0),
        lambda w: w.__iadd__(1),
        lambda w: setattr(w, "data", torch.ones(3, 4)),
        lambda w: nn.init.zeros_(w),
        lambda w: torch.relu_(w),
    ],
)
def test_what_would_be_lost_is_refused(write):
    weight, computed = deferred(torch.randn(3, 4))
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"computed anew each time; change base_layer\.weight"):
        write(weight)
    weight.requires_grad_(False)
    weight.requires_grad = False
    assert weight.data.dtype == torch.float32 and len(computed) <= 1


@pytest.mark.parametrize(
    "use",
    [
        lambda w: torch.ones(2, 4) @ w.t(),
        lambda w: nn.functional.linear(torch.ones(2, 4), w),
        lambda w: torch.cat([w, w]),
        lambda w: torch.stack((w * 2, w.float(), w.clone()))[0],
        lambda w: w.data[1:],
        lambda w: torch.einsum("oi,bi->bo", w, torch.ones(2, 4)),
        lambda w: torch.tensor(w.detach().numpy()),
    ],
)
def test_what_computes_with_it_has_the_weight_and_its_gradient(use):
    value = torch.randn(3, 4, requires_grad=True)
    weight, computed = deferred(value)
    result = use(weight)
    assert type(result) is torch.Tensor and torch.equal(result, use(value))
    assert len(computed) == 1 and repr(weight) == repr(value) and len(computed) == 1  # computed once
    assert result.requires_grad == use(value).requires_grad


def test_nothing_gets_past_it_without_a_gradient():
    weight, _ = deferred(torch.randn(3, 4, requires_grad=True))
    with torch._C.DisableTorchFunctionSubclass(), pytest.raises(RuntimeError, match=r"give it weight\.clone"):
        weight + 1


class Reader(nn.Module):
    """Never calls its linear layers, as attention's out_proj, Mamba's dt_proj and T5's wo are not, or not only."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.read, self.cast = (nn.Linear(32, 32) for _ in range(3))
        self.attention = nn.MultiheadAttention(32, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x @ self.read.weight.t() + self.read.bias
        x = self.first(x)
        x = self.attention(x, x, x, need_weights=False)[0]
        return self.cast(x.to(self.cast.weight.dtype))


@pytest.mark.filterwarnings("ignore:adapter 'default' is being trained")
@pytest.mark.filterwarnings("ignore:.* of the weights are in no linear layer")
@pytest.mark.parametrize("storage", ["full", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_parent_that_reads_the_weight_trains_and_merges_alike(storage, dtype):
    config = DLQATConfig(bits=3, group_size=16, r=4, target_modules="all-linear", storage=storage)
    model = get_peft_model(Reader().to(dtype), config)
    pack_weights(model)
    perturb(model)
    layers = adapter_layers(model)[1]
    assert len(layers) == 4 and all(layer.weight.dtype == dtype for layer in layers.values())
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    trained = model.train()(x)  # in eval mode torch's attention is another one where no gradient is wanted
    trained.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    model.merge_adapter()
    assert torch.equal(model(x), trained)
    model.unmerge_adapter()
    layer_module._warn_that_the_base_is_decoded.cache_clear()
    told = nullcontext() if storage == "full" else pytest.warns(UserWarning, match="packed")
    with torch.no_grad(), model.disable_adapter(), told:
        close = (model(x) - Reader().to(dtype)(x)).abs().max()
    assert close < (1e-6 if storage == "full" else 0.05)


def test_the_gradient_is_that_of_a_call():
    model = get_peft_model(nn.Sequential(nn.Linear(32, 16)), DLQATConfig(group_size=16, r=4, target_modules=["0"]))
    perturb(model)
    layer, x = model.base_model.model[0], torch.randn(5, 32)

    def gradients(output: torch.Tensor) -> list[torch.Tensor]:
        trained = [p for p in model.parameters() if p.requires_grad]
        return list(torch.autograd.grad(output.sin().sum(), trained))

    read = gradients(nn.functional.linear(x, layer.weight, layer.bias))
    assert all(torch.equal(a, b) for a, b in zip(read, gradients(layer(x)), strict=True))
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad((x @ layer.weight.t()).sum(), layer.dlqat_B["default"], create_graph=True)
