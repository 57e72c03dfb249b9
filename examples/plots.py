"""The two pictures that `finetune.py` draws."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from results import BASE, DLQAT, LORA, LORA_CLIPPED, LORA_RTN, RTN, Result

# Okabe and Ito's colours, which stay apart for every kind of colour vision; markers and hatches say the same again.
BLACK, ORANGE, SKY, GREEN, BLUE, VERMILLION = "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00"
CURVE_STYLES = [(BLUE, "o"), (VERMILLION, "s"), (GREEN, "^"), (ORANGE, "D")]
BARS = {RTN: ("0.75", ""), LORA_RTN: (ORANGE, "//"), LORA_CLIPPED: (SKY, ".."), DLQAT: (BLUE, "")}


def draw_curves(curves: dict[str, list[dict[str, Any]]], calibration_steps: int, path: Path) -> None:
    """Left: the calibration, if any. Right: training and held-out loss, against all steps taken."""
    ratios = [1, 2.2] if calibration_steps else [1]
    figure, axes = plt.subplots(
        1,
        len(ratios),
        figsize=(11 if calibration_steps else 7.5, 4.6),
        width_ratios=ratios,
        layout="constrained",
        squeeze=False,
    )
    left, right = axes[0, 0], axes[0, -1]
    dlqat = 0
    for name, log in curves.items():
        calibrated = [(entry["calibration_step"], entry["calibration/loss"]) for entry in log if _is_step(entry)]
        if name.startswith(DLQAT):
            color, marker = CURVE_STYLES[dlqat % len(CURVE_STYLES)]
            dlqat += 1
        else:
            color, marker = BLACK, "x"
        if calibrated and calibration_steps:
            left.plot(*zip(*calibrated, strict=True), color=color, marker=marker, markersize=4, label=name)
        first = calibration_steps if name.startswith(DLQAT) else 0
        trained = [(first + entry["step"], entry["loss"]) for entry in log if "loss" in entry]
        held_out = [(first + entry["step"], entry["eval_loss"]) for entry in log if "eval_loss" in entry]
        if trained:
            right.plot(*zip(*trained, strict=True), color=color, linewidth=1, alpha=0.35)
        if held_out:
            right.plot(*zip(*held_out, strict=True), color=color, marker=marker, linewidth=2, label=name)
    if calibration_steps:
        _label(left, "Calibration of scales and zeros", "optimiser step", "KL to full precision (nats a token)")
        left.set_xlim(0, 1.03 * calibration_steps)
        left.set_ylim(bottom=0)
        right.axvspan(0, calibration_steps, color="0.92", zorder=0)
        place = {"transform": right.get_xaxis_transform(), "rotation": 90, "ha": "center", "va": "bottom"}
        right.text(calibration_steps / 2, 0.03, "DL-QAT calibrates", **place)
    _label(right, "Training: the low-rank update learns the text", "optimiser step", "loss (nats a token)")
    right.legend(title="thick: held-out text; thin: training text", frameon=False, loc="upper right")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_bars(results: list[Result], path: Path) -> None:
    """Held-out perplexity by bit width, against full precision before and after fine-tuning."""
    groups = list(dict.fromkeys(result.bits for result in results if result.bits is not None))
    methods = [method for method in BARS if any(result.method == method for result in results)]
    perplexity = {(result.method, result.bits): result.perplexity for result in results}
    figure, axes = plt.subplots(figsize=(2.6 + 2.6 * len(groups), 4.8), layout="constrained")
    width = 0.8 / len(methods)
    for i, method in enumerate(methods):
        color, hatch = BARS[method]
        centres = [group + (i - (len(methods) - 1) / 2) * width for group in range(len(groups))]
        heights = [perplexity[method, bits] for bits in groups]
        bars = axes.bar(centres, heights, 0.92 * width, color=color, hatch=hatch, edgecolor="white", label=method)
        axes.bar_label(bars, [_short(height) for height in heights], padding=2)
    best = perplexity.get((LORA, None))
    for value, style, label in ((perplexity[BASE, None], ":", BASE), (best, "--", LORA)):
        if value is not None:
            axes.axhline(value, color=BLACK, linestyle=style, linewidth=1.2, label=f"{label}: {_short(value)}")
    highest, lowest = max(perplexity.values()), min(perplexity.values())
    if highest > 20 * lowest:
        axes.set_yscale("log")
        axes.set_ylim(lowest / 2, highest * 8)
    else:
        axes.set_ylim(0, 1.5 * highest)
    axes.set_xticks(range(len(groups)), [f"{bits} bits" for bits in groups])
    axes.tick_params(axis="x", length=0)
    _label(axes, _headline(perplexity, groups), "", "perplexity of held-out text (lower is better)")
    axes.legend(loc="upper left", frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _headline(perplexity: dict[tuple[str, int | None], float], groups: list[int]) -> str:
    """The point, where the figures make it."""
    after = (LORA_RTN, LORA_CLIPPED)
    better = all(perplexity[DLQAT, b] < perplexity.get((method, b), math.inf) for b in groups for method in after)
    if better and (LORA, None) in perplexity:
        return "Rounding after fine-tuning loses what DL-QAT keeps"
    return "Perplexity by bit width and method"


def _is_step(entry: dict[str, Any]) -> bool:
    return "calibration_step" in entry and "calibration/loss" in entry


def _short(value: float) -> str:
    return f"{value:.1f}" if value < 1000 else f"{value:.1e}"


def _label(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
