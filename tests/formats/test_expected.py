"""What is said of a file's size before it is written."""

import pytest
import torch
from export_models import adapted

from peft_dlqat import export_model, summarize
from peft_dlqat.formats import FORMATS, ExpectedFile

GRIDS = {
    "integer": {},
    "symmetric": {"zero_point": "none", "bits": 4},
    "offset": {"zero_point": "float", "bits": 2, "group_size": 64},
    "row": {"group_size": -1},
    "mixed": {"bits_pattern": {"down_proj": 8}, "zero_point": "integer"},
    "q3_k": {"bits": 3, "zero_point": "none", "group_size": 16, "scale_dtype": "k_quant"},
}


@pytest.mark.product(every=6)
@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("format", FORMATS)
def test_the_size_that_is_said_is_the_files(format, name, tmp_path):
    model = adapted("tied", dtype=torch.bfloat16, **GRIDS[name])
    (row,) = (row for row in summarize(model).files if row.format == format)
    if row.problem:
        with pytest.raises(ValueError, match="exactly"):
            export_model(model, tmp_path / "out", format, verify=False)
        return
    export_model(model, tmp_path / "out", format, verify=False)
    size = sum(path.stat().st_size for path in (tmp_path / "out").glob(FORMATS[format].files))
    assert row.size == pytest.approx(size, rel=0.02)


def test_a_model_that_the_format_cannot_describe_has_no_size():
    model = adapted("llama", bits=4)
    model.get_base_model().config.hidden_act = "relu"
    (row,) = summarize(model, formats=["gguf"]).files
    assert row.size == 0 and "hidden_act" in row.problem and str(row).startswith("none: ")


def test_a_line_of_it():
    row = ExpectedFile("gguf", "Q4_0", 4.5, 91_726_656, "bits=4 takes 4.50")
    assert str(row) == " 91.7 MB  Q4_0, 4.50 bits a weight; bits=4 takes 4.50"
