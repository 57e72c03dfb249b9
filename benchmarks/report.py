"""Makes the tables of docs/benchmarks.md and docs/speed.md, and all pictures, from the results that are there.

    python benchmarks/report.py

In a page a table stands between marks, `<!-- name -->` and `<!-- /name -->`.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import learning_rates
from run import rates_of
from runs import BY_DEFAULT, Results, Run, best_rates, kl, next_rates, that_count, whole

HERE = Path(__file__).resolve().parent
RESULTS, PAGES = HERE / "results", HERE.parent / "docs"
EXPERIMENTS = sorted((HERE / "experiments").glob("*.json"))
FULL_PRECISION, CEILING = "full-precision", "lsq"
Column = tuple[str, str]  # model, setting
# Heading of a table: its columns.
COMPARISONS: dict[str, dict[str, Column]] = {
    "stories260k": {name: ("stories260k", name) for name in ("3bit-row", "3bit-g32", "2bit-g32", "3bit-row-r32")},
    "groups of 43": {name: ("stories260k", name) for name in ("3bit-g32-g43", "2bit-g32-g43")},
    "sampled anew": {"3bit-row": ("stories260k-sampled", "3bit-row")},
    "domains": {
        "fitted on docstrings": ("embedded", "fit-on-training-text"),
        "on the reference": ("embedded", "fit-on-other-text"),
        "calibrated on docstrings": ("embedded", "calibration-100-on-training-text"),
        "calibrated on the reference": ("embedded", "calibration-100-on-other-text"),
    },
    "shapes": {
        "LLaMA": ("embedded", "shapes-2bit-g32"),
        "GPT-2": ("gpt2", "shapes-2bit-g32"),
        "OPT": ("opt", "shapes-2bit-g32"),
    },
    "group sizes": {
        "one a row": ("embedded", "groups-row"),
        "of 128": ("embedded", "groups-128"),
        "of 64": ("embedded", "groups-64"),
        "of 32": ("embedded", "groups-32"),
    },
    "k-quants": {name: ("embedded", name) for name in ("q3_k", "3bit-g32-symmetric", "q2_k", "2bit-g32-float")},
}
# What is changed, row-wise at 3 bits with r = 8 and real-valued offsets, and the setting where it is.
QUESTIONS = {
    "nothing": "3bit-row",
    "100 of the 800 steps calibrate s and b": "calibration-100",
    "1000 steps calibrate s and b before 800 train": "calibration-1000-before-800",
    "scales are fitted on random tokens": "calibration-on-random-tokens",
    "4 bits": "4bit-row",
    "2 bits": "2bit-row",
    "groups of 32": "3bit-g32",
    "groups of 16": "groups-16",
    "r = 32": "3bit-row-r32",
    "r = 64": "rank-64",
    "integer zeros": "integer-zero",
    "no zeros": "symmetric",
    "gradients are clipped to a norm of 1, the Trainer's default": "clipped",
}
ZEROS = ("stories260k", "embedded", "SmolLM2-135M")
# Settings of shortcuts.json, by what they are set against.
SHORTCUTS = {
    "3bit-row": ("3bit-row-bf16-gradient", "3bit-row-lowrank", "3bit-row-int8", "3bit-row-int4"),
    "3bit-g32": ("3bit-g32-row-magnitude", "3bit-g32-lowrank"),
    "2bit-row": ("2bit-row-lowrank",),
    "2bit-g32": ("2bit-g32-row-magnitude", "2bit-g32-lowrank", "2bit-g32-int8", "2bit-g32-int4", "2bit-g32-int2"),
}


@cache
def files() -> list[Results]:
    """Of the experiments that have been run."""
    return [Results(path) for path in (RESULTS / experiment.name for experiment in EXPERIMENTS) if path.exists()]


@cache
def all_of(model: str, setting: str) -> dict[str, list[Run]]:
    """All runs of a setting by contender, in whatever experiment."""
    found: dict[str, list[Run]] = {}
    for file in files():
        for run in file.of(model=model, setting=setting):
            found.setdefault(run["contender"], []).append(run)
    return found


def counting(model: str, setting: str) -> dict[str, list[Run]]:
    """Those that count, lowest KL first."""
    found = {name: that_count(runs) for name, runs in all_of(model, setting).items()}
    return dict(sorted(((n, runs) for n, runs in found.items() if runs), key=lambda item: kl(item[1])))


def spread(values: Iterable[float], digits: int = 3) -> str:
    """Mean, and over several runs ± their standard deviation."""
    values = list(values)
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def markdown(head: list[str], rows: Iterable[Iterable[str]]) -> str:
    """A table."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    lines[0] = lines[0].replace("|  |", "| |")
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def unfinished(model: str, setting: str, contender: str) -> bool:
    """Whether the search was not let go on while the best rate was at an end, or a better rate's runs are to come."""
    runs = all_of(model, setting)[contender]
    searched = [run["seed"] for run in runs if run["share"] < 1]
    if not searched:
        return False
    done = {(run["seed"], run["lr"]) for run in whole(runs)}
    seeds = {run["seed"] for run in that_count(runs)}
    missing = any((seed, lr) not in done for lr in best_rates(runs, searched[0]) for seed in seeds)
    experiments = [json.loads(path.read_text()) for path in EXPERIMENTS]
    given = next(rates_of(each, contender) for each in experiments if setting in each["settings"])
    return missing or bool(next_rates(runs, given, searched[0]))


def comparison(wanted: dict[str, Column]) -> str:
    """Held-out KL, one line a contender and one column a setting; the lowest but the ceiling's in bold."""
    columns = {label: counting(*column) for label, column in wanted.items()}
    for found in columns.values():
        found.pop(FULL_PRECISION, None)
    columns = {label: found for label, found in columns.items() if found}
    if not columns:
        return "Not run yet."
    width = {
        label: found.get(BY_DEFAULT, next(iter(found.values())))[0]["bits_per_weight"]
        for label, found in columns.items()
    }
    contenders = sorted(
        {name for found in columns.values() for name in found},
        key=lambda name: [kl(found[name]) if name in found else math.inf for found in columns.values()],
    )

    def cell(label: str, contender: str) -> str:
        found = columns[label]
        if contender not in found:
            return ""
        runs, lowest = found[contender], next(name for name in found if name != CEILING)
        least = kl(found[lowest])
        text = spread([run["kl"] for run in runs], 3 if least >= 0.02 else 4 if least >= 0.002 else 5)
        text = f"**{text}**" if contender == lowest and len(found) > 1 else text
        if "unmerged" in runs[0]:
            text += f" ({spread([run['unmerged']['kl'] for run in runs])})"
        return f"{text} °" if unfinished(*wanted[label], contender) else text

    rows = [["bits per weight", *(f"{width[label]:.2f}" for label in columns)]]
    rows += [[contender, *(cell(label, contender) for label in columns)] for contender in contenders]
    others = []
    for contender in contenders:  # whose width is not the column's
        own = {label: f[contender][0]["bits_per_weight"] for label, f in columns.items() if contender in f}
        if any(f"{bits:.2f}" != f"{width[label]:.2f}" for label, bits in own.items()):
            others.append(f"{contender}: {' / '.join(f'{bits:.2f}' for bits in own.values())}")
    note = f"\n\nBits per weight of {'; '.join(others)}." if others else ""
    return markdown(["", *columns], rows) + note


def questions() -> str:
    """Held-out KL of DL-QAT, one line a question."""
    rows, versions = [], {}
    for changed, setting in QUESTIONS.items():
        if runs := counting("stories260k", setting).get(BY_DEFAULT):
            width = f"{runs[0]['bits_per_weight']:.2f}"
            rows.append([changed, width, spread([run["kl"] for run in runs]), str(len(runs))])
            file = next(file for file in files() if setting in file.data["settings"])
            for version in {file.data["versions"][run["versions"]]["transformers"] for run in runs}:
                versions.setdefault(version, []).append(changed)
    of_each = "; ".join(f"{version}: {', '.join(changes)}" for version, changes in sorted(versions.items()))
    note = f"\n\nBy version of transformers, {of_each}." if len(versions) > 1 else ""
    return markdown(["changed", "bits per weight", "held-out KL", "runs"], rows) + note


def zeros() -> str:
    """Held-out KL of DL-QAT by the kind of zero, one line a model and number of bits."""
    rows = []
    kinds = ("none", "integer", "float")
    for model, bits, (suffix, when) in product(ZEROS, (4, 3, 2), (("-fit", "before training"), ("", "after it"))):
        found = [counting(model, f"{bits}bit-{kind}{suffix}").get(BY_DEFAULT) for kind in kinds]
        if all(found):
            rows.append([model, str(bits), when, *(f"{kl(runs or []):.4f}" for runs in found)])
    return markdown(["", "bits", "", *kinds], rows)


def tasks() -> str:
    """Of the contenders that were asked questions: KL, and accuracy on each task."""
    found = counting("embedded", "tasks-2bit-g32")
    if not found:
        return "Not run yet."
    names = list(next(iter(found.values()))[0]["tasks"])
    rows = [
        [
            contender,
            spread([run["kl"] for run in runs], 4),
            *(spread([100 * run["tasks"][name] for run in runs], 1) for name in names),
            str(len(runs)),
        ]
        for contender, runs in found.items()
    ]
    return markdown(["", "held-out KL", *(f"{name}, %" for name in names), "runs"], rows)


def cost() -> str:
    """How long the runs of a model took, the search of the learning rates with them."""
    by_model: dict[str, list[float]] = {}
    for run in (run for file in files() for run in file.data["runs"]):
        by_model.setdefault(run["model"], []).append(run["seconds"])
    return markdown(
        ["model", "in all"],
        [
            [model, f"{len(found)} runs, {sum(found) / 3600:.1f} hours of one core"]
            for model, found in sorted(by_model.items())
        ],
    )


def shortcuts() -> str:
    """One line a shortcut, beside the default on the same grid."""
    rows = []
    for default, names in SHORTCUTS.items():
        for name in names:
            runs, base = (counting("stories260k", setting).get(BY_DEFAULT) for setting in (name, default))
            if runs and base:
                rows.append([name, f"{kl(runs):.3f}", f"{kl(base):.3f}", str(len(runs))])
    return markdown(["", "held-out KL", "of the default", "runs"], rows)


def layer(results: dict[str, Any]) -> str:
    """One line a contender: time, with its quartiles, and what is kept for backward, of the first piece of work."""
    row = next(iter(results["rows"].values()))
    return markdown(
        ["", "time / LoRA's", "quartiles", "kept for backward beside the input, MB"],
        [
            [
                name,
                f"{ratio['median']:.2f}",
                f"{ratio['low']:.2f} to {ratio['high']:.2f}",
                f"{row['kept_bytes'][name] / 1e6:.1f}",
            ]
            for name, ratio in row["time_ratio"].items()
        ],
    )


def growth(results: dict[str, Any]) -> str:
    """Time over LoRA's, one line a piece of work, one column a contender that has done more than the first."""
    first, *others = (row["time_ratio"] for row in results["rows"].values())
    names = [name for name in first if name != "LoRA" and any(name in row for row in others)]
    rows = []
    for work, row in results["rows"].items():
        times = row["time_ratio"]
        rows.append([work, *(f"{times[name]['median']:.2f}" if name in times else "" for name in names)])
    return markdown(["", *names], rows)


def host(results: dict[str, Any]) -> str:
    """Time over LoRA's, one line a pass."""
    rows = results["rows"]
    names = [name for name in next(iter(rows.values())) if name != "LoRA"]
    lines = [[what, *(f"{row[name]['ratio']:.2f}" for name in names)] for what, row in rows.items()]
    return markdown(["", *(f"{name} / LoRA" for name in names)], lines)


def generation(results: dict[str, Any]) -> str:
    """Tokens a second over LoRA's, and megabytes of weights, one line a model."""
    names = [name for name in next(iter(results["rows"].values()))["bytes"] if name != "LoRA"]
    lines = []
    for size, row in results["rows"].items():
        rates = (f"{row['tokens_a_second_ratio'][name]:.2f}" for name in names)
        lines.append([size, *rates, *(f"{row['bytes'][name] / row['bytes']['LoRA']:.2f}" for name in names)])
    head = [*(f"{name}: tokens a second / LoRA's" for name in names), *(f"{name}: bytes / LoRA's" for name in names)]
    return markdown(["", *head], lines)


def model(results: dict[str, Any]) -> str:
    """One line a contender."""
    head = ["", "time / LoRA's", "quartiles", "peak memory / LoRA's", "resident before training, GB", "peak, GB"]
    rows = []
    for name, row in results["rows"].items():
        memory, time = row["bytes"], row["time_ratio"]
        sizes = [f"{memory[part] / 1e9:.2f}" for part in ("before training", "peak", "kept for backward")]
        quartiles = f"{time['low']:.2f} to {time['high']:.2f}"
        rows.append([name, f"{time['median']:.2f}", quartiles, f"{row['peak_ratio']:.2f}", *sizes])
    return markdown([*head, "kept for backward, GB"], rows)


def card_layers(lines: list[dict[str, Any]]) -> str:
    """One line a shape and number of tokens: milliseconds of LoRA's, and the others' over them."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for line in lines:
        if line["part"] == "layer" and line.get("ratio"):
            found.setdefault((line["shape"], line["tokens"]), {})[line["contender"]] = line
    names = list(dict.fromkeys(name for row in found.values() for name in row if name != "LoRA"))
    rows = []
    for (shape, tokens), row in found.items():
        ratios = (f"{row[name]['ratio']:.2f}" if name in row else "" for name in names)
        rows.append([shape, str(tokens), f"{row['LoRA']['ms']:.3f}", *ratios])
    return markdown(["", "tokens", "LoRA, ms", *(f"{name} / LoRA" for name in names)], rows)


def card_models(lines: list[dict[str, Any]]) -> str:
    """One line a contender and batch, and its generation."""
    rows = []
    for line in lines:
        if line["part"] == "model" and line.get("ratio"):
            peak = "" if line["peak_gib"] is None else f"{line['peak_gib']:.2f}"
            rows.append([line["contender"], line["step"], f"{line['ms']:.0f}", f"{line['ratio']:.2f}", peak])
    return markdown(["", "", "ms", "time / LoRA's", "peak, GiB"], rows)


def tables() -> dict[str, dict[str, str]]:
    """Markdown by page and name."""
    compared = {heading: comparison(columns) for heading, columns in COMPARISONS.items()}
    speed = {"shortcuts": shortcuts()}
    makers: dict[str, dict[str, Callable[..., str]]] = {
        "layer.json": {"layer": layer, "growth": growth},
        "model.json": {"model": model},
        "host.json": {"host": host},
        "generate.json": {"generate": generation},
    }
    for file, made in makers.items():
        if (RESULTS / file).exists():
            speed |= {name: make(json.loads((RESULTS / file).read_text())) for name, make in made.items()}
    if (RESULTS / "card.jsonl").exists():
        lines = [json.loads(line) for line in (RESULTS / "card.jsonl").read_text().splitlines()]
        speed |= {"card-layer": card_layers(lines), "card-model": card_models(lines)}
    compared["learning-rates"] = learning_rates.report(json.loads(learning_rates.RESULTS.read_text())["runs"])
    return {
        "benchmarks.md": {**compared, "questions": questions(), "zeros": zeros(), "tasks": tasks(), "cost": cost()},
        "speed.md": speed,
    }


def filled(text: str, tables: dict[str, str]) -> str:
    """A page's text with the tables in their places."""
    for name, table in tables.items():
        before, rest = text.split(f"<!-- {name} -->", 1)
        after = rest.split(f"<!-- /{name} -->", 1)[1]
        text = f"{before}<!-- {name} -->\n{table}\n<!-- /{name} -->{after}"
    return text


def draw_overview(path: Path) -> None:
    """README's picture: held-out KL on stories260k of this package and of what people would use instead."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    contenders = {
        BY_DEFAULT: "this package (DL-QAT)",
        "autoround": "AutoRound",
        "gptq": "GPTQ",
        "rtn-mse": "round to nearest",
        "torchao-qat-lora": "LoRA beside QAT,\nthen merged and rounded",
    }
    panels = {
        "3bit-g32": "3 bits, groups of 32",
        "3bit-row": "3 bits, one scale a row",
        "2bit-g32": "2 bits, groups of 32",
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(10, 2.7), sharey=True)
    for axis, (setting, title) in zip(axes, panels.items(), strict=True):
        found = counting("stories260k", setting)
        values = [kl(found[name]) for name in contenders]
        bars = axis.barh(list(contenders.values()), values, color=["tab:blue"] + ["lightgray"] * (len(contenders) - 1))
        axis.bar_label(bars, fmt="%.3f", padding=3, fontsize=8)
        axis.set(title=title, xlim=(0, 1.2 * max(values)))
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    axes[0].invert_yaxis()
    figure.supxlabel("KL divergence from the full-precision model, nats a token (lower is better)", fontsize=9)
    save(figure, path)


def draw(model: str, folder: Path) -> None:
    """Of a model KL against bits a weight, and against the time of training: a point a contender and setting."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    settings = {name: what["config"] for file in files() for name, what in file.data["settings"].items()}
    found = {name: counting(model, name) for name in sorted(settings)}
    rivals = {
        name: {who: runs for who, runs in row.items() if who != FULL_PRECISION and math.isfinite(kl(runs))}
        for name, row in found.items()
    }
    contenders = sorted({who for row in rivals.values() for who in row}, key=lambda who: (who != BY_DEFAULT, who))
    # The ten dark ones of the palette before the ten light ones.
    colours = {name: matplotlib.colormaps["tab20"](2 * i % 20 + i // 10) for i, name in enumerate(contenders)}
    label = "held-out KL, nats a token"

    figure, axis = plt.subplots(figsize=(8, 4.2))
    plain = {"zero_point": "float", "r": 8}  # beside bits and group size
    for who in contenders:
        row_wise = []
        for name, row in rivals.items():
            config = settings[name]
            of_these = config.keys() == {*plain, "bits", "group_size"} and plain.items() <= config.items()
            if who in row and of_these:
                point = row[who][0]["bits_per_weight"], kl(row[who])
                axis.scatter(
                    *point, color=colours[who], marker=f"${config['bits']}$", s=50, zorder=2 + (who == BY_DEFAULT)
                )
                row_wise += [point] if config["group_size"] == -1 else []
        axis.plot(*zip(*sorted(row_wise), strict=True) if row_wise else ([], []), color=colours[who], linewidth=1)
        axis.plot([], [], "s", color=colours[who], label=who)
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    axis.set(yscale="log", xlabel="bits per weight; the digit: bits of a code; lines: one scale a row", ylabel=label)
    save(figure, folder / "bits.png")

    times = {
        row["setting"]: row["ratios"] for file in files() for row in file.data["step_times"] if row["model"] == model
    }
    times = {name: times[name] for name in sorted(times)}
    figure, axes = plt.subplots(-(-len(times) // 2), 2, figsize=(9.4, 4.2 * -(-len(times) // 2)), squeeze=False)
    for axis, (name, ratios) in zip(axes.flat, times.items(), strict=False):
        for who, runs in rivals[name].items():
            if who in ratios:
                axis.scatter(ratios[who]["median"], kl(runs), color=colours[who])
                axis.annotate(who, (ratios[who]["median"], kl(runs)), fontsize=7)
        axis.set(title=name, yscale="log", xlabel="training time / DL-QAT's", ylabel=label)
    for axis in axes.flat[len(times) :]:
        axis.remove()
    save(figure, folder / "time.png")


def draw_layer(results: dict[str, Any], path: Path) -> None:
    """Ratios of a layer's time with their quartiles, one panel a contender."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = {name: row["time_ratio"] for name, row in results["rows"].items()}
    first = next(iter(rows.values()))
    names = [name for name in first if name.startswith("DL-QAT") and all(name in row for row in rows.values())]
    tall = -(-len(names) // 3)
    figure, axes = plt.subplots(tall, 3, figsize=(9.4, 3 * tall), sharey=True, sharex=True, squeeze=False)
    for axis in axes.flat[len(names) :]:
        axis.remove()
    for axis, name in zip(axes.flat, names, strict=False):
        for i, row in enumerate(rows.values()):
            axis.barh(i, row[name]["median"], color="tab:blue")
            axis.plot([row[name]["low"], row[name]["high"]], [i, i], color="black")
        axis.axvline(1, color="gray", linewidth=0.8)
        axis.set_title(name.replace(", ", "\n"), fontsize=8)
        axis.set_xlabel("time / LoRA's", fontsize=8)
        axis.tick_params(labelsize=8)
    axes.flat[0].set_yticks(range(len(rows)), list(rows))
    axes.flat[0].invert_yaxis()
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    """Write a picture."""
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main() -> None:
    """Fill the pages and draw the pictures."""
    for page, made in tables().items():
        path = PAGES / page
        path.write_text(filled(path.read_text(encoding="utf-8"), made), encoding="utf-8")
    draw_overview(RESULTS / "overview.png")
    draw("stories260k", RESULTS)
    draw_layer(json.loads((RESULTS / "layer.json").read_text()), RESULTS / "layer.png")


if __name__ == "__main__":
    main()
