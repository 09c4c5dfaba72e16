"""Build an index: `python jobs/build_index.py --corpus x.jsonl --out index/`, or through `ray job submit`.

Run the same command again to go on with one that was stopped. The corpus and the folder are paths of the
machine on which this runs; the other nodes see neither. Exit codes: 0 the index is there, 1 failures,
2 a mistake in what was asked, 130 or 143 stopped by a signal.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

ROOT = Path(__file__).resolve().parent.parent
if not __package__:
    # A script's folder comes first on sys.path, where `jobs/` would hide packages of the same name.
    sys.path[0] = str(ROOT)

import typer

from ray_app import driver, ray_cluster
from ray_app.errors import EvalError
from ray_app.retrieval.build import DOCUMENT_BATCH
from ray_app.retrieval.build_job import Order, carry_out
from ray_app.retrieval.encoder import BUNDLED


def main(
    corpus: Annotated[Path, typer.Option(help="JSONL: `id`, and `content` or `contents`.")],
    out: Annotated[Path, typer.Option(help="The index folder; made if it is not there.")],
    encoder: Annotated[
        str, typer.Option(help="'minilm' (bundled), a model folder, a Hugging Face id.")
    ] = BUNDLED,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="What the model computes in.")
    ] = "float32",
    truncate_dim: Annotated[
        int | None, typer.Option(min=1, help="Keep the first dimensions of a model trained for it.")
    ] = None,
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="auto: GPUs where the cluster has any.")
    ] = "auto",
    batch: Annotated[int, typer.Option(min=1, help="Documents that a model takes at once.")] = DOCUMENT_BATCH,
    cpus_per_worker: Annotated[
        int, typer.Option(min=1, help="More than 1 for a model too large for a copy on each CPU.")
    ] = 1,
    force: Annotated[bool, typer.Option("--force", help="Replace the index that OUT holds.")] = False,
) -> None:
    """Embed CORPUS on the whole Ray cluster and write the index to OUT. The same command resumes."""
    console = driver.make_console()

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    def connect() -> None:
        ray_cluster.connect(say)
        driver.raise_on_signals()  # Ray has put its own handler in place

    order = Order(corpus, out, encoder, dtype, truncate_dim, device, batch, cpus_per_worker, force)
    try:
        with driver.signals_raise():
            carry_out(order, say, connect)
    except EvalError as error:
        raise typer.Exit(driver.report_error(error, console)) from None
    except driver.Stopped as stopped:
        say("stopped; what is embedded is kept, the same command goes on")
        raise typer.Exit(stopped.exit_code) from None


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(main)

if __name__ == "__main__":
    app()
