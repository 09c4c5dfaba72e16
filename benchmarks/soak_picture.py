"""The picture of a soak: memory, descriptors and log over time, kills marked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from analysis.panels import BLACK, BLUE, CYCLE, GREEN, GREY, ORANGE, PURPLE, RED, SKY
from analysis.plots import figure, save
from benchmarks.soak_watch import HOLDING, MIB, Measure, Watch, descriptors, oldest_worker, rss

_PRODUCT = "driver, workers and checkpoint actor"
_COLOURS = {
    _PRODUCT: BLACK,
    "driver": BLUE,
    "workers": ORANGE,
    "oldest worker, never killed": RED,
    "checkpoint actor": GREEN,
    "raylet": PURPLE,
    "GCS": SKY,
}


def draw(watch: Watch, since: float, path: Path) -> list[Path]:
    """Writes `path` plus .png and .svg, and names them. `since`: the share of the tasks compared with."""
    own = {_PRODUCT: HOLDING, "driver": ("driver",), "workers": ("workers",)}
    others = {name: (name,) for name in ("checkpoint actor", "raylet", "GCS")}
    memory = {name: rss(*kinds) for name, kinds in own.items()}
    memory |= {"oldest worker, never killed": oldest_worker("rss")}
    memory |= {name: rss(*kinds) for name, kinds in others.items()}
    opened = {name: descriptors(*kinds) for name, kinds in own.items()}
    opened |= {"oldest worker, never killed": oldest_worker("descriptors")}
    opened |= {name: descriptors(*kinds) for name, kinds in others.items()}
    with figure(13, 11) as canvas:
        canvas.set_layout_engine("constrained")
        upper, middle, lower = canvas.subplots(3, 1, sharex=True)
        _lines(upper, watch, memory, "Resident memory, MiB", 1 / MIB)
        _lines(middle, watch, opened, "Open descriptors", 1.0)
        _log(lower, watch)
        for axes in (upper, middle, lower):
            _marks(axes, watch, since)
        upper.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=9)
        lower.set_xlabel("seconds since the driver's start")
        return save(canvas, path)


def _lines(axes: Any, watch: Watch, measures: Mapping[str, Measure], title: str, factor: float) -> None:
    times = [sample.at_s for sample in watch.samples]
    for name, measure in measures.items():
        values = [factor * measure(sample) for sample in watch.samples]
        axes.plot(times, values, color=_COLOURS[name], label=name, linewidth=1.2)
    axes.set_title(title)
    axes.set_ylim(bottom=0)
    axes.grid(axis="y")


def _log(axes: Any, watch: Watch) -> None:
    times = [sample.at_s for sample in watch.samples]
    axes.plot(times, [sample.log_bytes / MIB for sample in watch.samples], color=BLUE, linewidth=1.2)
    axes.set_title("Log on disk, MiB; its files; tasks done, share of the most")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("MiB", color=BLUE)
    axes.grid(axis="y")
    files = axes.twinx()
    files.plot(times, [sample.log_files for sample in watch.samples], color=CYCLE[1], linewidth=0.8)
    files.set_ylim(bottom=0)
    files.set_ylabel("files", color=CYCLE[1])
    most = max(sample.log_files for sample in watch.samples) or 1
    files.plot(times, [most * sample.done / watch.tasks for sample in watch.samples], color=GREY, linewidth=1)


def _marks(axes: Any, watch: Watch, since: float) -> None:
    for kill in watch.killed:
        axes.axvline(kill.at_s, color=RED if kill.kind == "workers" else GREEN, linewidth=0.6, alpha=0.6)
    compared = min(watch.run, key=lambda sample: abs(sample.done / watch.tasks - since))
    last = watch.run[-1]
    for sample, words in ((compared, f"{since:.0%} done"), (last, "all done")):
        axes.axvline(sample.at_s, color=GREY, linewidth=1, linestyle="--")
        axes.annotate(
            words,
            (sample.at_s, 0.02),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            xytext=(3, 0),
            fontsize=8,
            color=GREY,
        )
