"""MLX's files hold the merged model, as mlx-lm runs it."""

from __future__ import annotations

import pytest
from export_models import adapted, as_id, assert_same, held_grids, needs

from peft_dlqat import export_model


@pytest.mark.product(every=5)
@pytest.mark.parametrize("setting", held_grids("mlx", (32, 256)), ids=as_id)
def test_mlx_holds_the_merged_model(setting, tmp_path):
    needs("mlx")
    assert_same(export_model(adapted(**setting), tmp_path / "out", "mlx"), "mlx")
