"""AutoRound (arXiv 2309.05516): learn the direction of every rounding, and every range, by signed gradient descent.

    w_hat = S * (clip(round(W / S + V) + z, 0, 2**bits - 1) - z)

V, in [-0.5, 0.5], and the ends of each group's range, which give S and z, are trained.
Decoder layer by decoder layer, 200 steps each on the squared error of its output (eq. 3), all of the library's
defaults but for the data. Library: auto-round (seen with 0.16.1 on CPU, beside torch 2.13.0 and transformers 5.23.0).

It has symmetric grids and integer zero points, so "integer" stands in for "float": its data type with a real-valued
one, "int_asym_float_zp", adds z after rounding and so lands between the levels. The plain data type "int" leaves out
layers whose sizes are no multiples of 32, "int_asym" and "int_sym" take any.
"""

from __future__ import annotations

from types import SimpleNamespace

from transformers import PreTrainedModel

from .common import SCALE_DTYPE, Batches, Config, check_levels, grid_of, linear_layers

try:
    from auto_round import AutoRound
    from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig
except ImportError as error:
    raise ImportError("the peer autoround needs auto-round: pip install auto-round==0.16.1") from error


def quantize(model: PreTrainedModel, config: Config, batches: Batches, steps: int) -> PreTrainedModel:
    """Quantize every linear layer but the head.

    Args:
        model: a causal language model.
        config: the grid; "float" becomes "integer".
        batches: calibration data, all of one length.
        steps: of signed gradient descent, a decoder layer; the library's default is 200.
    """
    rows, length = batches[0]["input_ids"].shape
    symmetric = config.zero_point == "none"
    rounder = AutoRound(
        model,
        # It asks for a tokenizer, of which it reads only which tokens are padding.
        SimpleNamespace(pad_token=None, pad_token_id=None),
        scheme={
            "bits": config.bits,
            "group_size": config.group_size,
            "sym": symmetric,
            "data_type": "int_sym" if symmetric else "int_asym",
            "act_bits": 16,
        },
        layer_config={
            name: {"bits": grid.bits, "group_size": grid.group_size}
            for name, layer in linear_layers(model).items()
            for grid in (grid_of(config, layer),)
        },
        alg_configs=SignRoundConfig(iters=steps),
        dataset=[batch["input_ids"] for batch in batches],
        seqlen=length,
        nsamples=rows * len(batches),
        batch_size=rows,
        scale_dtype=str(SCALE_DTYPE).removeprefix("torch."),
        device_map="cpu",
        amp=False,
        enable_torch_compile=False,
        low_cpu_mem_usage=False,
    )
    quantized, _ = rounder.quantize()
    return check_levels(quantized.eval(), config)
