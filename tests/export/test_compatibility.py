"""Which formats hold a config, before anything is trained."""

from __future__ import annotations

from peft_dlqat import DLQATConfig, export_formats
from peft_dlqat.formats import FORMATS


def test_the_table_of_formats():
    table = export_formats(DLQATConfig(bits=3, zero_point="float", bits_pattern={"down_proj": 4}))
    rows = {(row.format, row.grid[:6]): row for row in table.rows}
    assert len(rows) == 2 * len(FORMATS)
    assert rows["gguf", "bits=3"].stored == "Q4_1" and rows["gguf", "bits=3"].bits_per_weight == 5.0
    assert rows["mlx", "bits=4"].bits_per_weight == 4.25
    assert "use zero_point='integer'" in rows["compressed-tensors", "bits=3"].problem
    assert "Q4_1" in str(table) and "not exactly" in str(table)
    # The test of exports shows that float32 is exact, and that bfloat16 is not.
    assert rows["dense", "bits=3"].stored == "float32" and rows["dense", "bits=3"].bits_per_weight == 32.0
    assert "32.00  (16 bits round each weight once)" in str(table)
