"""w_hat that is kept between forward passes is never a stale one."""

import copy
import gc
import io
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch
from accelerate import cpu_offload
from conftest import perturb
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_dlqat import DLQATConfig, kept_weight, pack_weights
from peft_dlqat import layer as layer_module
from peft_dlqat.kept_weight import MOST_ROWS

IN, OUT = 32, 24


def make(conv1d=False, perturbed=True, **changes):
    torch.manual_seed(0)
    base = nn.Sequential(Conv1D(OUT, IN) if conv1d else nn.Linear(IN, OUT))
    settings = {"bits": 3, "group_size": 16, "r": 4, "target_modules": ["0"], **changes}
    model = get_peft_model(base, DLQATConfig(**settings)).eval()
    if perturbed:
        perturb(model)
    return model


def layer_of(model):
    return model.base_model.model[0]


def kept(model):
    return layer_of(model)._kept_weight._content is not None


@torch.no_grad()
def run(model, rows=3):
    return model(torch.randn(rows, IN, generator=torch.Generator().manual_seed(rows)))


def anew(model):
    """The output without what is kept."""
    layer_of(model)._kept_weight.clear()
    return run(model)


@pytest.fixture
def made():
    """How often a weight is made."""
    with mock.patch.object(layer_module, "quantized", wraps=layer_module.quantized) as found:
        yield found


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("zero_point", ["none", "integer", "float"])
def test_it_is_made_once_and_gives_the_same_bits(conv1d, zero_point, made):
    model = make(conv1d, zero_point=zero_point)
    with mock.patch.object(type(layer_of(model)), "_may_keep", return_value=False):
        expected = run(model)
    assert made.call_count == 0
    assert all(torch.equal(run(model), expected) for _ in range(3)) and made.call_count == 1
    assert torch.equal(run(model, rows=200), run(copy.deepcopy(model), rows=200)) and made.call_count == 1
    model.merge_adapter()
    assert torch.equal(run(model), expected)


WAYS = {
    "data.copy_": lambda parameter, value: parameter.data.copy_(value),
    "data =": lambda parameter, value: setattr(parameter, "data", value),
    "in place": lambda parameter, value: parameter.detach().copy_(value),
    "one number": lambda parameter, value: parameter.data.view(-1)[-1:].copy_(value.view(-1)[-1:]),
}
NAMES = ["dlqat_A", "dlqat_B", "dlqat_magnitude", "dlqat_shift", "dlqat_scale", "dlqat_offset", "base_layer.weight"]


@pytest.mark.parametrize(
    ("name", "way"),
    # Of W0, which nobody trains, a sample is looked at.
    [(name, way) for name in NAMES for way in WAYS if (name, way) != ("base_layer.weight", "one number")],
)
def test_a_tensor_that_was_written_counts(name, way):
    model = make(zero_point="float")
    before = run(model)
    (parameter,) = (parameter for key, parameter in model.named_parameters() if name in key)
    WAYS[way](parameter, 1.5 * parameter.data + 0.25)
    assert kept(model)
    found = run(model)
    assert torch.equal(found, anew(model))
    assert way == "one number" or not torch.equal(found, before)


def other(model):
    """The same model, otherwise trained."""
    result = copy.deepcopy(model)
    perturb(result, seed=1)
    return result


CHANGES = {
    "load_state_dict": lambda model: model.load_state_dict(other(model).state_dict()),
    "load_state_dict, assigned": lambda model: model.load_state_dict(other(model).state_dict(), assign=True),
    "another dtype": lambda model: model.double() and None,
    "another adapter": lambda model: (
        model.add_adapter("b", DLQATConfig(bits=2, group_size=16, target_modules=["0"])),
        model.set_adapter("b"),
        model.eval(),
    ),
    "optimizer": lambda model: [parameter.data.add_(0.1) for parameter in model.parameters()],
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_has_changed_counts(change):
    model = make()
    before = run(model)
    CHANGES[change](model)
    x = torch.randn(3, IN, generator=torch.Generator().manual_seed(3)).to(layer_of(model).base_layer.bias.dtype)
    with torch.no_grad():
        found = model(x)
        layer_of(model)._kept_weight.clear()
        assert torch.equal(found, model(x))
    assert not torch.equal(found.float(), before)


def test_a_part_of_w0_that_was_written_counts():
    """Whichever columns or rows."""
    model = make()
    weight = layer_of(model).base_layer.weight
    for part in (slice(None), slice(0, 16)), (slice(None), slice(16, 32)), (slice(0, 12), slice(None)):
        run(model)
        weight.data[part] = 0
        assert kept(model)
        assert torch.equal(run(model), anew(model))


def test_merging_and_switching_off():
    model = make()
    active = run(model)
    with model.disable_adapter():
        assert not torch.equal(run(model), active)
    model.merge_adapter()
    assert torch.equal(run(model), active) and not kept(model)
    model.unmerge_adapter()
    assert torch.equal(run(model), active) and torch.equal(anew(model), active)


def test_nothing_is_kept_while_it_trains_or_with_gradients_or_for_long_inputs(made):
    model = make()
    run(model, rows=MOST_ROWS + 1)
    model(torch.randn(3, IN)).sum().backward()
    assert not kept(model)
    run(model.train())
    assert not kept(model) and made.call_count == 0
    run(model.eval(), rows=MOST_ROWS)
    assert kept(model)
    run(model, rows=MOST_ROWS + 1)  # if it is there
    assert kept(model) and made.call_count == 1
    layer_of(model).dlqat_B["default"].data += 1
    run(model, rows=MOST_ROWS + 1)
    assert not kept(model) and made.call_count == 1
    run(model)
    assert kept(model) and not kept(model.train())


def test_of_packed_weights_so_much_is_kept_as_the_budget_says(made, monkeypatch):
    model = make(storage="int4", perturbed=False)
    run(model)
    assert kept(model)
    pack_weights(model)
    assert not kept(model)
    counted, size = kept_weight._packed_bytes, 4 * IN * OUT
    monkeypatch.setattr(kept_weight, "PACKED_BUDGET", counted + 2 * size)
    expected = run(model)
    assert kept(model) and made.call_count == 2
    assert torch.equal(expected, anew(model)) and torch.equal(expected, run(model)) and made.call_count == 3
    others = [copy.deepcopy(model) for _ in range(2)]
    assert all(torch.equal(run(other), expected) for other in others)
    assert [kept(other) for other in others] == [True, False]
    layer_of(model).dlqat_B["default"].data += 1  # what is kept is renewed in its own place
    assert torch.equal(run(model), anew(model)) and kept(model)
    model.train()
    run(others[1])
    assert kept(others[1])
    del others
    gc.collect()
    assert kept_weight._packed_bytes == counted


def test_nothing_is_kept_of_an_offloaded_weight(made):
    model = make()
    expected = run(copy.deepcopy(model))
    made.reset_mock()
    cpu_offload(model.base_model.model, execution_device=torch.device("cpu"))
    assert torch.equal(run(model), expected) and not kept(model) and made.call_count == 0


def test_copies_and_pickles_are_without_it():
    model = make()
    expected = run(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for again in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert not kept(again) and torch.equal(run(again), expected)


def test_in_inference_mode_and_out_of_it(made):
    model = make()
    x = torch.randn(3, IN)
    with torch.inference_mode():
        first = model(x)
    with torch.no_grad():
        assert torch.equal(model(x), first) and made.call_count == 1
    y = model(x)  # with gradients
    y.sum().backward()
    assert torch.equal(y, first) and layer_of(model).dlqat_B["default"].grad is not None


def test_autocast_has_a_weight_of_its_own():
    model, x = make(), torch.randn(3, IN)
    with torch.no_grad():
        full = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            half = model(x)
        assert half.dtype == torch.bfloat16 and torch.equal(model(x), full)
        with torch.autocast("cpu", torch.bfloat16):
            layer_of(model)._kept_weight.clear()
            assert torch.equal(model(x), half)


def test_threads_share_it():
    model, inputs = make(), [torch.randn(3, IN) for _ in range(16)]
    expected = [model(x).detach() for x in inputs]

    def job(x):
        with torch.no_grad():
            return model(x)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(job, inputs))
    assert all(map(torch.equal, found, expected))
