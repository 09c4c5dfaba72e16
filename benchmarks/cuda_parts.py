"""Parts of the GPU figures: timing on a device, an encoder with random weights, FAISS where it is installed.

Owns what is the same for every row. It knows no target and prints nothing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

PIECE_ROWS = 1 << 14


def seconds(calls: Sequence[Callable[[], object]], device: torch.device, graph: bool = False) -> float:
    """The median time of one call, the calls taking turns. `graph` leaves launches out, on CUDA."""

    def run_all() -> None:
        for call in calls:
            call()

    run_all()
    run = _captured(run_all) if graph and device.type == "cuda" else run_all
    repeats = int(min(100, max(5, 1 / _clock(run, device))))
    return statistics.median(_clock(run, device) for _ in range(repeats)) / len(calls)


def _clock(run: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    event: Any = torch.cuda.Event
    begin, end = event(enable_timing=True), event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def _captured(run: Callable[[], object]) -> Callable[[], object]:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def build_encoder(arguments: dict[str, Any], device: torch.device) -> Any:
    """A Qwen3 model with random weights in bfloat16."""
    from transformers import AutoModel, Qwen3Config  # takes seconds, and only one section needs it

    make: Any = AutoModel.from_config
    with device:
        model = make(Qwen3Config(**arguments), dtype=torch.bfloat16, attn_implementation="sdpa")
    return model.eval()


def set_compiled(model: Any, is_compiled: bool) -> None:
    """Lets torch compile the layers, or not. All layers are the same code, so it is compiled once."""
    torch._dynamo.reset()
    for layer in model.layers:
        layer._compiled_call_impl = None
        if is_compiled:
            layer.compile(dynamic=False)


def encode(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Unit vectors of texts of one length: the last token's state. No padding, so no mask either."""
    hidden = model(input_ids=ids, use_cache=False).last_hidden_state
    return torch.nn.functional.normalize(hidden[:, -1].float())


def encoder_flops(model: Any, texts: int, tokens: int) -> float:
    """Two per weight and token outside the embedding; attention as causal, which is half the square."""
    weights = sum(p.numel() for p in model.parameters()) - model.embed_tokens.weight.numel()
    config = model.config
    attention = 2 * tokens**2 * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    return float(texts * (2 * weights * tokens + attention))


def gpu_faiss() -> Any | None:
    """FAISS, where it is installed with its GPU part."""
    try:
        import faiss
    except ImportError:
        return None
    return faiss if hasattr(faiss, "StandardGpuResources") else None


def faiss_index(faiss: Any, vectors: torch.Tensor) -> Any:
    config = faiss.GpuIndexFlatConfig()
    config.useFloat16 = True
    index = faiss.GpuIndexFlatIP(faiss.StandardGpuResources(), vectors.shape[1], config)
    for start in range(0, len(vectors), PIECE_ROWS):
        index.add(vectors[start : start + PIECE_ROWS].float().cpu().numpy())
    return index
