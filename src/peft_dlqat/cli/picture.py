"""A picture of how each layer uses its grid."""

from __future__ import annotations

from pathlib import Path

from ..train.report import GridReport


def draw(report: GridReport, path: Path) -> None:
    """A row a figure, a column a layer in the model's order.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("--png needs matplotlib: pip install matplotlib") from error
    figures = {
        "error  |w_hat - W0| / |W0|": [[row.error for row in report.layers]],
        "share of weights clipped": [[row.clipped for row in report.layers]],
        "codes in use, of 2^bits": [[row.levels / 2**row.bits for row in report.layers]],
        "m, smallest and largest of a layer": [
            [row.magnitude_min for row in report.layers],
            [row.magnitude_max for row in report.layers],
        ],
    }
    figure, axes = pyplot.subplots(len(figures), 1, sharex=True, figsize=(10, 8), layout="constrained")
    for axis, (title, lines) in zip(axes, figures.items(), strict=True):
        for line in lines:
            axis.plot(line, marker=".", linewidth=0.8, color="tab:blue")
        axis.set_title(title, loc="left", fontsize=9)
        axis.grid(alpha=0.3)
    axes[-1].set_xlabel(f"layer, from {report.layers[0].name} to {report.layers[-1].name}")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
