"""Calibration and the Trainer callback: what moves, what it gains, and what it leaves alone."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import VOCAB, calibrated, computing, lm_batches, perturb, tiny_model, tokens
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    LlamaConfig,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

import peft_dlqat.quant.quantizer
from peft_dlqat import (
    DLQATCallback,
    DLQATConfig,
    calibrate,
    distillation_loss,
    grid_report,
)
from peft_dlqat.layer import adapter_layers, is_calibrated
from peft_dlqat.quant.quantizer import unrounded_codes
from peft_dlqat.record import Record
from peft_dlqat.running import adapters_disabled, teacher_logits
from peft_dlqat.train.fit_to_inputs import InputMoments, fit_to_inputs, input_moments

ZERO_POINTS = ("none", "integer", "float")


def adapted(**config):
    torch.manual_seed(0)
    config = {"bits": 2, "group_size": 32, "init": "minmax", "task_type": "CAUSAL_LM", **config}
    return get_peft_model(tiny_model(), DLQATConfig(**config))


def kl(model):
    batch = lm_batches(1, batch=8)[0]
    model.eval()
    with torch.no_grad():
        return distillation_loss(model(**batch).logits, teacher_logits(model, batch)).item()


@pytest.mark.product
@pytest.mark.parametrize("zero_point", ZERO_POINTS)
@pytest.mark.parametrize("objective", ["distill", "task"])
def test_calibration_lowers_the_loss_and_moves_only_the_grid(zero_point, objective):
    model = adapted(zero_point=zero_point, init="minmax")
    before = {name: tensor.clone() for name, tensor in computing(model).items()}
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    result = calibrate(model, lm_batches(), steps=40, objective=objective, progress=False)
    assert result.kept == "after" and result.loss_after < 0.97 * result.loss_before
    moved = {
        name.removesuffix(".weight").split(".")[-2]
        for name, tensor in computing(model).items()
        if not torch.equal(tensor, before[name])
    }
    zero = {"none": set(), "integer": {"dlqat_zero_point"}, "float": {"dlqat_offset"}}[zero_point]
    assert moved == {"dlqat_scale"} | zero
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable
    assert not any(tensor.requires_grad for name, tensor in model.named_buffers())


@pytest.mark.product
@pytest.mark.parametrize("by", ["model", "blocks"])
@pytest.mark.parametrize("zero_point", ZERO_POINTS)
def test_the_lowrank_gradient_is_for_training_only(zero_point, by):
    """The step has no gradient on the low-rank path: scales and zeros are fitted as ever."""
    grids = []
    for gradient in ("exact", "lowrank"):
        model = adapted(zero_point=zero_point, magnitude="row", gradient=gradient, init="minmax")
        calibrate(model, lm_batches(2), steps=3, by=by, progress=False)
        grids.append([layer.dlqat_scale["default"] for layer in adapter_layers(model)[1].values()])
    assert all(torch.equal(one, other) for one, other in zip(*grids, strict=True))


def test_the_reported_loss_is_of_the_frozen_scales():
    """The figures are those of the model as it is afterwards, zero points rounded."""
    model = adapted(init="mse")
    batches = lm_batches()
    result = calibrate(model, batches, steps=20, progress=False)
    model.eval()
    with torch.no_grad():
        losses = [distillation_loss(model(**b).logits, teacher_logits(model, b), b["labels"]).item() for b in batches]
    assert result.loss_after == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert calibrated(model)


@pytest.mark.product
@pytest.mark.parametrize("zero_point", ZERO_POINTS)
@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float16", "float32"])
def test_the_frozen_grid_is_one_that_ships(zero_point, scale_dtype):
    model = adapted(zero_point=zero_point, scale_dtype=scale_dtype)
    calibrate(model, lm_batches(), steps=10, progress=False)
    for layer in adapter_layers(model)[1].values():
        grid, scale, zero = (
            layer.specs["default"].grid,
            layer.dlqat_scale["default"],
            layer.scales_and_zeros("default")[1],
        )
        assert torch.equal(scale, grid.round_scale(scale)) and scale.all()
        assert zero_point == "none" or (scale > 0).all()
        if zero_point == "integer":
            assert torch.equal(zero, zero.round()) and zero.min() >= grid.qmin and zero.max() <= grid.qmax
        shipped = layer.quantized_weight()
        assert torch.equal(shipped.scale, shipped.scale.to(grid.scale_dtype).float())


def test_calibration_is_repeatable_and_leaves_random_numbers_alone():
    states = []
    for _ in range(2):
        model = adapted(init="mse")
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
        loader = torch.utils.data.DataLoader(tokens(16), batch_size=4, shuffle=True, collate_fn=collate)
        calibrate(model, loader, steps=6, progress=False)
        assert random.getstate() == before[0]
        assert (np.random.get_state()[1] == before[1]).all()
        assert torch.equal(torch.get_rng_state(), before[2])
        states.append(model.state_dict())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def collate(rows):
    return {"input_ids": torch.stack(list(rows))}


def test_steps_that_gain_nothing_are_undone():
    """The fit to the inputs stays, as it would without steps."""
    model, fitted = adapted(init="mse"), adapted(init="mse")
    best = calibrate(fitted, lm_batches(3), steps=0, progress=False)
    result = calibrate(model, lm_batches(3), steps=3, lr=10.0, progress=False)
    assert best.kept == result.kept == "fitted" and best.loss_after < best.loss_before
    assert result.loss_after == best.loss_after == best.loss_fitted and "undone" in str(result)
    assert all(torch.equal(tensor, fitted.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_a_fit_that_gains_nothing_is_undone(monkeypatch):
    model = adapted(init="mse")
    before = {name: tensor.clone() for name, tensor in computing(model).items()}
    monkeypatch.setattr(
        "peft_dlqat.train.calibrate.fit_to_inputs",
        lambda layers, *_: [layer.dlqat_scale["default"].data.mul_(3) for layer in layers.values()],
    )
    result = calibrate(model, lm_batches(), progress=False)
    assert result.kept == "before" and result.loss_after == result.loss_before < result.loss_fitted
    assert "put back" in str(result)
    assert all(torch.equal(tensor, before[name]) for name, tensor in computing(model).items())


@pytest.mark.parametrize("zero_point", ZERO_POINTS)
def test_the_fit_to_the_inputs_minimises_the_weighted_error(zero_point):
    model = adapted(zero_point=zero_point, init="mse")
    _, layers = adapter_layers(model)
    batches = lm_batches()
    moments = input_moments(model, layers, batches, progress=False)
    # Inputs more unequal than a random model's.
    moments = {name: moment * torch.linspace(-2, 2, len(moment)).exp() for name, moment in moments.items()}

    def error():
        return {
            name: ((layer.quantized_weight().dequantize() - layer.frozen.original()).square() @ moments[name]).sum()
            for name, layer in layers.items()
        }

    before = error()
    fit_to_inputs(layers, moments, "default", "mse")
    assert all(error()[name] <= before[name] for name in layers)
    assert sum(error().values()) < 0.99 * sum(before.values())


@pytest.mark.parametrize("kind, layer", [("llama", "0.mlp.up_proj"), ("gpt2", "0.mlp.c_fc"), ("opt", "0.fc1")])
def test_input_moments_are_those_of_the_unquantized_model_without_padding(kind, layer):
    model = get_peft_model(tiny_model(kind), DLQATConfig(bits=2, group_size=32, init="minmax", task_type="CAUSAL_LM"))
    _, layers = adapter_layers(model)
    name = next(name for name in layers if name.endswith(layer))
    ids, mask = tokens(2), torch.ones(2, 16, dtype=torch.long)
    mask[1, 5:] = 0
    batches = [{"input_ids": ids, "attention_mask": mask}, {"input_ids": tokens(1)}]
    found = input_moments(model, layers, batches, progress=False)[name]

    seen = []
    base = tiny_model(kind)
    base.get_submodule(name.removeprefix("base_model.model.")).register_forward_pre_hook(
        lambda _, args: seen.append(args[0].detach().flatten(0, -2))
    )
    with torch.no_grad():
        base(input_ids=ids, attention_mask=mask), base(input_ids=tokens(1))
    rows = torch.cat([seen[0][mask.flatten().bool()], seen[1]])
    assert torch.allclose(found, rows.square().mean(0), rtol=1e-5)
    assert not any(module._forward_pre_hooks for module in layers.values())


def test_a_loader_may_be_short_where_there_are_no_steps():
    """Without steps the loader is read once, up to eight batches."""
    model = adapted(init="mse")
    result = calibrate(model, iter(lm_batches(3)), progress=False)
    assert result.steps == 0 and result.loss_after < result.loss_before
    read = []
    calibrate(adapted(init="mse"), (read.append(1) or batch for batch in lm_batches(20)), progress=False)
    assert len(read) == 8


def test_calibrate_works_on_a_model_with_an_injected_adapter():
    model = tiny_model()
    model.add_adapter(DLQATConfig(bits=2, group_size=32, init="minmax"))
    result = calibrate(model, lm_batches(), steps=20, progress=False)
    assert result.loss_after < result.loss_before


def test_calibrate_one_of_two_adapters():
    model = adapted()
    model.add_adapter("other", DLQATConfig(bits=2, group_size=32, init="minmax", task_type="CAUSAL_LM"))
    before = {name: tensor.clone() for name, tensor in computing(model).items()}
    model.set_adapter("other")
    calibrate(model, lm_batches(), steps=10, progress=False)
    moved = [name for name, tensor in computing(model).items() if not torch.equal(tensor, before[name])]
    assert moved and all(name.endswith(".other.weight") for name in moved)


def test_padding_and_ignored_labels_do_not_count():
    logits, teacher = torch.randn(1, 6, 8), torch.randn(1, 6, 8)
    labels = torch.tensor([[-100, -100, 5, 6, -100, -100]])
    expected = distillation_loss(logits[:, 1:3], teacher[:, 1:3])
    assert torch.allclose(distillation_loss(logits, teacher, labels), expected)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0]])
    assert torch.allclose(
        distillation_loss(logits, teacher, mask=mask), distillation_loss(logits[:, :3], teacher[:, :3])
    )
    assert distillation_loss(teacher, teacher).abs() < 1e-6


def test_adapters_disabled_is_the_base_and_changes_no_flags():
    model = adapted()
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    with torch.no_grad():
        with adapters_disabled(model):
            inside = model(tokens()).logits
        outside = model(tokens()).logits
    assert torch.equal(inside, tiny_model()(tokens()).logits)
    assert not torch.equal(outside, inside)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


# The callback


def trainer(model, folder, callback=None, **kwargs):
    data = [{"input_ids": row, "labels": row} for row in tokens(32)]
    options = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 2e-4,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
        **kwargs.pop("args", {}),
    }
    callbacks = [c for c in (callback, *kwargs.pop("callbacks", ())) if c is not None]
    return Trainer(model, TrainingArguments(**options), train_dataset=data, callbacks=callbacks, **kwargs)


def test_callback_calibrates_before_the_first_step_and_logs(tmp_path, capsys):
    """All figures go to the log's history; gain and grid are printed, a line each."""
    model = adapted(init="mse")
    run = trainer(model, tmp_path, DLQATCallback(calibration_steps=8, report_steps=2))
    run.train()
    log = run.state.log_history
    steps = [entry for entry in log if "calibration/loss" in entry]
    assert [entry["calibration_step"] for entry in steps] == list(range(1, 9))
    assert all(entry["step"] == 0 for entry in steps)
    (gain,) = [entry for entry in log if "calibration/loss_after" in entry]
    assert gain["calibration/loss_after"] < gain["calibration/loss_before"]
    assert [entry["step"] for entry in log if "grid/clipped" in entry] == [2, 4]
    first_loss = next(i for i, entry in enumerate(log) if "loss" in entry)
    assert all("calibration/loss" not in entry for entry in log[first_loss:])
    assert calibrated(model)
    printed = capsys.readouterr().err.splitlines()
    (line,) = [line for line in printed if line.startswith("calibrated: KL to the full-precision model ")]
    assert f"{gain['calibration/loss_after']:.4f} (8 steps)" in line
    grids = [line for line in printed if line.startswith("grid at step ")]
    assert [line.split(":")[0] for line in grids] == ["grid at step 2", "grid at step 4"]
    assert all("clipped 0." in line and ", magnitude_max 1." in line for line in grids)


def test_only_the_main_process_prints(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    trainer(adapted(), tmp_path, DLQATCallback(report_steps=1)).train()
    printed = capsys.readouterr().err
    assert "calibrated:" not in printed and "grid at step" not in printed


def test_calibration_does_not_change_the_order_of_training_data(tmp_path):
    """The same batches are trained on with and without a calibration before."""
    orders = []
    for steps in (0, 5):
        seen = []
        model = adapted(init="mse")
        model.register_forward_pre_hook(
            lambda module, args, kwargs, seen=seen: seen.append(kwargs["input_ids"].clone()), with_kwargs=True
        )
        run = trainer(model, tmp_path, DLQATCallback(calibration_steps=steps))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model.base_model, "_warned", {"default"})
            run.train()
        orders.append(seen[-4:])
    assert all(torch.equal(a, b) for a, b in zip(*orders, strict=True))


def test_an_adapter_calibrated_before_is_not_calibrated_again(tmp_path):
    model = adapted()
    calibrate(model, lm_batches(), steps=4, progress=False)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter", is_trainable=True)
    run = trainer(loaded, tmp_path, DLQATCallback(calibration_steps=4))
    run.train()
    assert not any("calibration/loss" in entry for entry in run.state.log_history)
    assert calibrated(loaded)


def test_checkpoints_carry_the_record(tmp_path):
    trainer(adapted(), tmp_path, DLQATCallback(calibration_steps=4), args={"save_steps": 2}).train()
    saved = load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
    assert {Record.decode(value).calibrated for key, value in saved.items() if "dlqat_record" in key} == {True}
    card = (tmp_path / "checkpoint-2" / "README.md").read_text()
    assert "import peft_dlqat" in card and "| calibration | done |" in card


def test_packed_weights_are_not_resumed_from_a_checkpoint_of_full_ones(tmp_path):
    """It would be another model from there on."""
    trainer(adapted(), tmp_path, DLQATCallback(), args={"save_steps": 2}).train()
    again = trainer(adapted(storage="int8"), tmp_path, DLQATCallback(), args={"max_steps": 6})
    with pytest.raises(ValueError, match=r"checkpoint was trained on full weights.*resume with storage='full'"):
        again.train(resume_from_checkpoint=True)


def test_callback_names_the_layer_whose_magnitude_explodes(tmp_path):
    model = adapted()
    name, layer = list(adapter_layers(model)[1].items())[3]
    calibrate(model, lm_batches(), steps=1, progress=False)
    tensor, magnitude = layer.trained("default")["magnitude"]
    magnitude.data[0, 0] = 50.0 / tensor.unit
    with pytest.warns(UserWarning, match=f"{name}.*magnitude has exploded.*lower the learning rate") as caught:
        trainer(model, tmp_path, DLQATCallback(report_steps=1)).train()
    assert sum("exploded" in str(w.message) for w in caught) == 1


def test_callback_names_a_layer_when_the_loss_is_no_number(tmp_path):
    """Under the Trainer's defaults, which log a NaN loss as a number."""
    model = adapted()
    layers = list(adapter_layers(model)[1].values())
    calibrate(model, lm_batches(), steps=1, progress=False)
    layers[3].dlqat_magnitude["default"].data[0, 0] = torch.nan
    with pytest.warns(
        UserWarning, match=f"not finite, and its .* holds NaN or infinity, as .* of {len(layers)} layers"
    ):
        trainer(model, tmp_path, DLQATCallback(report_steps=0)).train()


def test_distilling_an_encoder_decoder():
    """Its decoder takes its inputs from the labels; the label at i belongs to the logits at i, and -100 to none."""
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
    config = T5Config(vocab_size=VOCAB, decoder_start_token_id=0, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = get_peft_model(T5ForConditionalGeneration(config).eval(), DLQATConfig(bits=3, group_size=16))
    batch = {"input_ids": tokens(), "labels": tokens(length=9, seed=1)}
    batch["labels"][:, 6:] = -100
    with torch.no_grad():
        teacher, logits = teacher_logits(model, batch)[:, :6], model(**batch).logits[:, :6]
        divergence = (teacher.softmax(-1) * (teacher.log_softmax(-1) - logits.log_softmax(-1))).sum(-1).mean()
    assert calibrate(model, [batch], progress=False).loss_before == pytest.approx(divergence.item(), rel=1e-4) != 0


@pytest.mark.filterwarnings("ignore:.* is not saved with the adapter")
@pytest.mark.filterwarnings('ignore:"all-linear" leaves out linear layers')  # the head of one output
@pytest.mark.parametrize("head", [{"num_labels": 1}, {"problem_type": "multi_label_classification"}], ids=str)
def test_distilling_a_head_without_a_distribution(head):
    """A reward, a regression, several labels at once: the logits themselves are compared."""
    config = LlamaConfig(vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=2, pad_token_id=0)
    config.update(head)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = get_peft_model(LlamaForSequenceClassification(config).eval(), DLQATConfig(bits=3, group_size=32))
    batch = {"input_ids": tokens(), "attention_mask": torch.ones(4, 16).long()}
    with torch.no_grad():
        error = (teacher_logits(model, batch) - model(**batch).logits).square().mean().item()
    result = calibrate(model, [batch], progress=False)
    assert result.loss_before == pytest.approx(error, rel=1e-4) != 0
    assert result.objective == "logits" and "full-precision model's logits" in str(result)


# The report


def test_grid_report_figures():
    model = adapted(zero_point="none", bits=4)
    report = grid_report(model)
    assert len(report.layers) == 14 and not report.problems
    row, layer = report.layers[0], next(iter(adapter_layers(model)[1].values()))
    w_hat, w0 = layer.quantized_weight().dequantize(), layer.frozen.original()
    assert row.error == pytest.approx(((w_hat - w0).norm() / w0.norm()).item(), rel=1e-4)
    assert row.magnitude_min == row.magnitude_max == 1
    codes = layer.quantized_weight().codes.view(-1, 32)
    assert row.levels == pytest.approx(sum(len(group.unique()) for group in codes) / len(codes), rel=1e-5)
    assert "q_proj" in str(report) and 0 <= report.summary()["grid/clipped"] < 0.1


@pytest.mark.parametrize(
    "damage, problem",
    [
        (lambda layer: layer.dlqat_scale["default"].mul_(0.01), "most codes are clipped"),
        (lambda layer: layer.dlqat_scale["default"].mul_(100), "onto one level"),
        (lambda layer: layer.dlqat_magnitude["default"].data.fill_(torch.nan), "magnitude has exploded"),
        (lambda layer: layer.dlqat_magnitude["default"].data.fill_(-20), "magnitude has exploded"),
        (lambda layer: layer.dlqat_scale["default"].requires_grad_(True), "is trainable"),
    ],
)
def test_grid_report_finds_each_known_failure(damage, problem):
    model = adapted()
    name, layer = list(adapter_layers(model)[1].items())[5]
    damage(layer)
    problems = grid_report(model).problems
    assert len(problems) == 1 and problems[0].startswith(name) and problem in problems[0]


def test_by_blocks_lowers_the_loss_too():
    model = adapted(init="minmax")
    before = {name: tensor.clone() for name, tensor in computing(model).items()}
    result = calibrate(model, iter(lm_batches(10)), steps=20, by="blocks", progress=False)
    assert result.kept == "after" and result.loss_after < result.loss_before
    assert calibrated(model)
    moved = {name for name, tensor in computing(model).items() if not torch.equal(tensor, before[name])}
    assert {name.removesuffix(".weight").split(".")[-2] for name in moved} in (
        {"dlqat_scale"},
        {"dlqat_scale", "dlqat_zero_point"},
    )
    assert not any(tensor.requires_grad for name, tensor in model.named_buffers())


class Flat(torch.nn.Module):
    """A language model without a list of layers."""

    def __init__(self):
        super().__init__()
        self.embed, self.body = torch.nn.Embedding(64, 64), torch.nn.Linear(64, 64)

    def forward(self, input_ids, labels=None):
        return SimpleNamespace(logits=self.body(self.embed(input_ids)))


class Residual(torch.nn.Module):
    """A language model with a list of layers, but something happens between them."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(64, 64)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(64, 64) for _ in range(2))

    def forward(self, input_ids, labels=None):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + layer(x)
        return SimpleNamespace(logits=x)


@pytest.mark.parametrize("kind, target", [(Flat, "body"), (Residual, "0")])
@pytest.mark.parametrize("restartable", [False, True])
def test_by_blocks_falls_back_on_the_whole_model(kind, target, restartable):
    model = get_peft_model(kind(), DLQATConfig(bits=2, group_size=32, target_modules=[target], init="minmax"))
    batches = [{"input_ids": tokens(seed=seed)} for seed in range(4)]
    with pytest.warns(UserWarning, match="the model is no list of decoder layers.*calibrated as a whole"):
        result = calibrate(
            model, batches if restartable else iter(batches), steps=20, by="blocks", lr=1e-2, progress=False
        )
    assert result.kept == "after" and result.loss_after < 0.99 * result.loss_before
    assert (result.by, result.steps) == ("model", 20)


def test_by_blocks_falls_back_on_the_whole_encoder_decoder():
    sizes = {"d_model": 64, "d_ff": 64, "num_layers": 1, "num_heads": 2, "d_kv": 32, "decoder_start_token_id": 0}
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=VOCAB, **sizes))
    model = get_peft_model(t5, DLQATConfig(bits=2, group_size=32, init="minmax"))
    with pytest.warns(UserWarning, match="calibrated as a whole"):
        batches = [{"input_ids": tokens(), "labels": tokens()[:, :1]}]  # of one token, which no shift leaves
        result = calibrate(model, batches, steps=5, by="blocks", objective="task", progress=False)
    assert (result.by, result.steps) == ("model", 5) and result.loss_before > 0


def test_by_blocks_measures_the_inputs_once(monkeypatch):
    fits = []
    for module in ("calibrate", "blocks"):
        name = f"peft_dlqat.train.{module}.fit_to_inputs"
        monkeypatch.setattr(name, lambda layers, *_: fits.extend(layers))
    model = adapted(init="mse")
    calibrate(model, lm_batches(), steps=2, by="blocks", progress=False)
    assert sorted(fits) == sorted(adapter_layers(model)[1])


@pytest.mark.parametrize("way", [{}, {"by": "blocks"}, {"by": "blocks", "objective": "output"}])
def test_every_way_says_that_it_was_done(way):
    model = adapted(init="mse")
    assert not calibrated(model)
    calibrate(model, lm_batches(), steps=4, progress=False, **way)
    assert calibrated(model)


@pytest.mark.parametrize("by", ["model", "blocks"])
def test_min_max_does_not_look_at_the_inputs_and_claims_no_fit(by, monkeypatch):
    monkeypatch.setattr("peft_dlqat.train.calibrate.input_moments", lambda *_: pytest.fail("measured in vain"))
    model = adapted(init="minmax")
    before = {name: tensor.clone() for name, tensor in computing(model).items()}
    result = calibrate(model, lm_batches(), progress=False)
    assert (result.loss_fitted, result.kept) == (None, "before") and "fitted" not in str(result)
    assert all(torch.equal(tensor, before[name]) for name, tensor in computing(model).items())
    result = calibrate(model, lm_batches(), steps=20, by=by, progress=False)
    assert result.loss_fitted is None and result.kept == "after" and result.loss_after < result.loss_before


def test_a_grid_that_was_put_back_is_not_called_fitted(monkeypatch):
    monkeypatch.setattr(
        "peft_dlqat.train.calibrate.fit_to_inputs",
        lambda layers, *_: [layer.dlqat_scale["default"].data.mul_(3) for layer in layers.values()],
    )
    result = calibrate(adapted(init="mse"), lm_batches(), progress=False)
    assert result.kept == "before" and str(result).endswith("; the initial scales and zeros were put back")


@pytest.mark.parametrize("steps", [0, 2])
def test_an_adapter_that_is_not_active_is_refused(steps):
    """Its grid would get no gradient, and the record would claim a calibration that never was."""
    model = adapted()
    model.add_adapter("other", DLQATConfig(bits=2, group_size=32, init="minmax", task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match=r"'other' must be the active one.*set_adapter\('other'\)"):
        calibrate(model, lm_batches(), steps=steps, adapter_name="other", progress=False)
    with model.disable_adapter(), pytest.raises(ValueError, match="switched on"):
        calibrate(model, lm_batches(), steps=steps, progress=False)
    for name in model.peft_config:
        assert not is_calibrated(adapter_layers(model, name)[1].values(), name)


@pytest.mark.parametrize("zero_point", ZERO_POINTS)
def test_the_grid_report_is_the_same_piece_by_piece(zero_point, monkeypatch):
    """Against whole layers, by hand; pieces of 3 rows, which do not divide a layer's."""
    model = adapted(zero_point=zero_point, init="minmax")
    perturb(model)
    monkeypatch.setattr(peft_dlqat.quant.quantizer, "_PIECE", 3 * 64)
    for row in grid_report(model).layers:
        layer = model.get_submodule(row.name)
        shipped, weight = layer.quantized_weight(), layer.frozen.original()
        w_hat = shipped.dequantize()
        assert row.error == pytest.approx(((w_hat - weight).norm() / weight.norm()).item(), rel=1e-5)
        groups = shipped.grid.group(shipped.codes)
        levels = [len(set(group)) for group in groups.flatten(0, 1).tolist()]
        assert row.levels == pytest.approx(sum(levels) / len(levels))
        unrounded = unrounded_codes(weight, layer.quantizer("default"))
        outside = (unrounded.round() < shipped.grid.qmin) | (unrounded.round() > shipped.grid.qmax)
        assert row.clipped == pytest.approx(outside.float().mean().item()) and row.clipped > 0


def test_a_merged_adapter_is_not_trained(tmp_path):
    model = adapted()
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"is merged into the base model.*unmerge_adapter\(\)"):
        trainer(model, tmp_path, DLQATCallback(calibration=False)).train()


def test_inputs_of_one_vector_are_one_row():
    """A layer may see a vector without a batch beside the batches of the others."""
    torch.manual_seed(0)
    config = DLQATConfig(bits=3, group_size=8, target_modules=["0"])
    layer = get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 4)), config).base_model.model[0]
    with InputMoments({"layer": layer}) as moments:
        rows = torch.randn(5, 8)
        for x in (rows[0], rows[1:3], rows[3:].view(1, 2, 1, 8)):
            layer(x)
    torch.testing.assert_close(moments.means()["layer"], rows.square().mean(0))
