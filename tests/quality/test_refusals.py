"""The check that a refused call changed nothing can fail."""

import pytest
import torch
from foreign_layers import Net
from refusals import refused, snapshot
from torch import nn


@pytest.mark.parametrize("change", ["weight", "module", "flag", "mode", "file", "new folder", "seed"])
def test_harm_is_noticed(change, tmp_path):
    model = Net()
    (tmp_path / "file").write_text("1")
    assert snapshot(model, tmp_path) == snapshot(model, tmp_path)
    harm = {
        "weight": lambda: model.first.weight.data[0, 0].add_(1),
        "module": lambda: setattr(model, "second", nn.Sequential(model.second)),
        "flag": lambda: model.first.weight.requires_grad_(False),
        "mode": model.first.eval,
        "file": lambda: (tmp_path / "file").write_text("2"),
        "new folder": (tmp_path / "new").mkdir,
        "seed": lambda: torch.rand(1),
    }[change]
    with pytest.raises(AssertionError, match="changed"), refused(ValueError, model=model, folder=tmp_path):
        harm()
        raise ValueError


def test_missing_words_are_noticed():
    with pytest.raises(AssertionError, match="does not say"), refused(ValueError, "bits=9"):
        raise ValueError("bits are wrong")
