"""What is equal to the bit on which architecture. Writes docs/architectures.md.

python tests/architecture_table.py            # the page
python tests/architecture_table.py NAME ...   # prints the lines of some architectures
"""

from __future__ import annotations

import copy
import re
import sys
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from architectures import ARCHITECTURES, Architecture
from conftest import perturb
from peft import PeftModel, get_peft_model
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

from peft_dlqat import DLQATConfig, pack_weights
from peft_dlqat.layer import adapter_layers

PAGE = Path(__file__).resolve().parents[1] / "docs" / "architectures.md"
EXACT = "exact"


class Case:
    """An architecture with an adapter whose trained tensors have moved."""

    def __init__(self, architecture: Architecture, folder: str, **settings: Any) -> None:
        self.architecture, self.inputs, self.folder = architecture, architecture.inputs(), folder
        self.base = architecture.make()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            self.model = get_peft_model(architecture.make(), DLQATConfig(bits=3, r=4, init="minmax", **settings))
        self.said = "\n".join(str(warning.message) for warning in said)
        pack_weights(self.model)
        perturb(self.model)
        self.layers = adapter_layers(self.model)[1]
        self.trained = self.run(self.model.eval())

    @torch.no_grad()
    def run(self, model: nn.Module) -> list[torch.Tensor]:
        """Everything that a model gives in eval mode."""
        torch.manual_seed(0)
        return _tensors(model(**self.inputs))

    def backward(self, model: nn.Module) -> None:
        """Backward of a loss on all that a model gives in training mode; statistics of batch norms are put back."""
        before = [(module._buffers, copy.deepcopy(module._buffers)) for module in model.modules()]
        model.train()
        torch.manual_seed(0)
        outputs = [tensor for tensor in _tensors(model(**self.inputs)) if tensor.requires_grad]
        sum((tensor * torch.linspace(-1, 1, tensor.numel()).view_as(tensor)).sum() for tensor in outputs).backward()
        model.eval()
        for buffers, kept in before:
            buffers.update(kept)

    def compare(self, model: nn.Module, expected: list[torch.Tensor]) -> str:
        found = self.run(model)
        worst = max((a.float() - b.float()).abs().max().item() for a, b in zip(expected, found, strict=True))
        return EXACT if all(map(torch.equal, expected, found)) else f"differs by {worst:.1g}"


def _tensors(output: Any) -> list[torch.Tensor]:
    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
    assert leaves
    return leaves


def gradient(case: Case) -> str:
    """How many layers have finite gradients that are not zero, in each trained tensor. Others should not have any."""
    base = case.architecture.make()
    weights = {}
    for name in case.layers:  # each its own, so that those of one weight are told apart
        module = base.get_submodule(name.removeprefix("base_model.model."))
        weights[name] = module.weight = nn.Parameter(module.weight.clone())
    case.backward(base)
    case.backward(case.model)
    reached = 0
    for name, layer in case.layers.items():
        trained = [getattr(layer, kind) for kind in layer.adapter_layer_names]
        found = [tensors["default"].grad for tensors in trained if "default" in tensors]
        alive = [grad is not None and bool(grad.isfinite().all()) and bool(grad.any()) for grad in found]
        of_base = weights[name].grad
        if all(alive) != (of_base is not None and bool(of_base.any())):
            return f"{name}: {alive}"
        reached += all(alive)
    return f"{reached} of {len(case.layers)}"


def reload(case: Case) -> str:
    """Saved, and loaded onto another copy of the base model."""
    case.model.save_pretrained(case.folder)
    case.loaded = PeftModel.from_pretrained(case.architecture.make(), case.folder).eval()
    return case.compare(case.loaded, case.trained)


def merge(case: Case) -> str:
    """Merged in place, and for good."""
    case.model.merge_adapter()
    in_place = case.compare(case.model, case.trained)
    case.merged = case.loaded.merge_and_unload()
    return case.compare(case.merged, case.trained) if in_place == EXACT else in_place


def saved(case: Case) -> str:
    """The merged model, saved as transformers saves models, and loaded again."""
    if not isinstance(case.merged, transformers.PreTrainedModel):
        return ""
    folder = Path(case.folder, "merged")  # not the adapter's, which transformers would load on top
    case.merged.save_pretrained(folder)
    # Where a weight takes a gradient, torch may choose another product.
    return case.compare(type(case.merged).from_pretrained(folder).requires_grad_(False), case.trained)


def unmerge(case: Case) -> str:
    case.model.unmerge_adapter()
    return case.compare(case.model, case.trained)


def base_untouched(case: Case) -> str:
    """With the adapter off, and without it: what the model gives, and its weights."""
    expected, weights = case.run(case.base), case.base.state_dict()
    with case.model.disable_adapter():
        found = [case.compare(case.model, expected)]
    unloaded = case.model.unload()
    found += [case.compare(unloaded, expected)]
    after = unloaded.state_dict()
    if after.keys() != weights.keys() or any(not torch.equal(after[key], weights[key]) for key in weights):
        found += ["the weights are others"]
    return next((fault for fault in found if fault != EXACT), EXACT)


COLUMNS = (gradient, reload, merge, saved, unmerge, base_untouched)


def examine(architecture: Architecture) -> dict[str, str]:
    """The cells of one line, and under "refused" the reason where some say so."""
    names = [column.__name__ for column in COLUMNS]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            case = Case(architecture, folder)
        except ValueError as error:
            return {
                "adapted": "0",
                "left out": "",
                "refused": str(error),
                **dict.fromkeys([*names, "packed"], "refused"),
            }
        cells = {"adapted": str(len(case.layers)), "left out": _left_out(case)}
        cells |= {name: column(case) for name, column in zip(names, COLUMNS, strict=True)}
        try:
            packed = Case(architecture, folder, storage="int8")
        except ValueError as error:
            return {**cells, "packed": "refused", "refused": str(error)}
        found = [column(packed) for column in (reload, merge, unmerge)]
    return {**cells, "packed": next((fault for fault in found if fault != EXACT), EXACT)}


def _left_out(case: Case) -> str:
    """Linear layers that "all-linear" leaves out, by what it says of them; it says nothing of the output head."""
    linear = sum(isinstance(module, nn.Linear | Conv1D) for module in case.base.modules())
    said = re.findall(r"(\d+) with ([^,]*), such as", case.said)
    heads = linear - len(case.layers) - sum(int(count) for count, _ in said)
    parts = [f"{count} with {reason}" for count, reason in said]
    parts += [f"{heads} output head" + "s" * (heads > 1)] if heads else []
    elsewhere = re.search(r"(\d+%) of the weights", case.said)
    return "; ".join(parts + ([f"{elsewhere[1]} elsewhere"] if elsewhere else []))


def faults(cells: dict[str, str]) -> dict[str, str]:
    """Cells that say neither that all is right nor, where all may, that it was refused."""
    adapted = int(cells["adapted"])
    right = {column.__name__: {EXACT} if adapted else {"refused"} for column in COLUMNS}
    right |= {"packed": {EXACT, "refused"}, "saved": right["saved"] | {""}}
    if adapted:
        right["gradient"] = {f"{reached} of {adapted}" for reached in range(1, adapted + 1)}
    return {column: cells[column] for column, good in right.items() if cells[column] not in good}


def line(architecture: Architecture, cells: dict[str, str]) -> str:
    """A line of the table."""
    shown = [cells[name] for name in ("adapted", "left out", *(column.__name__ for column in COLUMNS), "packed")]
    return re.sub(" +", " ", f"| {' | '.join([architecture.kind, f'`{architecture.name}`', *shown])} |")


def page() -> str:
    """docs/architectures.md, its tables made anew."""
    found = {architecture: examine(architecture) for architecture in ARCHITECTURES}
    versions = " and ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    head = ["kind", "architecture", "adapted", "left out", *(column.__name__ for column in COLUMNS), "packed"]
    table = [
        f"{len(found)} architectures, with {versions}, on one thread:\n",
        f"| {' | '.join(head).replace('base_untouched', 'base')} |",
        "|---" * len(head) + "|",
        *(line(architecture, cells) for architecture, cells in found.items()),
    ]
    refused = [f"- `{each.name}`: {cells['refused']}" for each, cells in found.items() if "refused" in cells]
    text = PAGE.read_text(encoding="utf-8")
    for name, lines in (("table", table), ("refused", refused)):
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        text = f"{text.partition(start)[0]}{start}\n{chr(10).join(lines)}\n{end}{text.partition(end)[2]}"
    return text


def prepare() -> None:
    """What the bits of the table rest on."""
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    # torch's own attention takes another way where no weight wants a gradient, which an adapter's does.
    torch.backends.mha.set_fastpath_enabled(False)


if __name__ == "__main__":
    prepare()
    if sys.argv[1:]:
        for architecture in ARCHITECTURES:
            if architecture.name in sys.argv:
                cells = examine(architecture)
                print(line(architecture, cells), cells.get("refused", ""), faults(cells) or "")
    else:
        PAGE.write_text(page(), encoding="utf-8")
