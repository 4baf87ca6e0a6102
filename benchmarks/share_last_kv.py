"""The price of ``share_last_kv``: bits per byte and cache bytes, against a cache of every loop and against none.

A small looped model is trained on the bundled text (without a cache the option changes nothing: one training serves
both). Held-out windows are then scored in three ways with the same weights: in one pass; fed token by token through a
cache of every visit; fed token by token through a cache of the last loop only.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

from common import build, cross_entropy, load, parser, progress, report, set_threads

if TYPE_CHECKING:
    from torch import Tensor

    from ouroboros.model.modeling import OuroborosForCausalLM

WINDOW = 256
PROMPT = 64
"""Bytes of a window fed in one pass first, as a prompt is; the option approximates what follows."""


def main() -> None:
    """Train, then score."""
    options = parser(__doc__)
    options.add_argument("--seconds", type=float, default=120.0, help="time to train")
    options.add_argument("--layouts", nargs="+", default=["1 (2)x2 1", "1 (1)x4 1"])
    options.add_argument("--windows", type=int, default=64, help="held-out windows of 256 bytes")
    chosen = options.parse_args()
    started = load()
    set_threads(chosen.threads)
    seconds, windows = (1.0, 4) if chosen.quick else (chosen.seconds, chosen.windows)
    layouts = chosen.layouts[:1] if chosen.quick else chosen.layouts
    report(
        "share_last_kv",
        started,
        seconds_of_training=seconds,
        held_out_bytes_scored=windows * (WINDOW - PROMPT),
        layouts={layout: compare(layout, seconds, windows) for layout in layouts},
    )


def compare(layout: str, seconds: float, count: int) -> dict[str, Any]:
    """Train one layout and score it in three ways."""
    import torch

    from ouroboros.accounting import cost
    from ouroboros.config import AttentionSpec, FeedForwardSpec, ModelSpec, RMSNormSpec

    spec = ModelSpec(layout=layout, hidden_size=128).replace(
        mixer=AttentionSpec(num_heads=4),
        ffn=FeedForwardSpec(intermediate_size=352),
        norm=RMSNormSpec(placement="sandwich"),
    )
    training, held_out = (torch.frombuffer(bytearray(text), dtype=torch.uint8).long() for text in texts())
    model = build(spec)
    loss = train(model, training, seconds)
    progress(f"{layout}: trained to {loss / math.log(2):.3f} bits per byte")
    shared = build(spec.replace(share_last_kv=True))
    shared.load_state_dict(model.state_dict())
    starts = torch.linspace(0, len(held_out) - WINDOW, count).long()
    windows = torch.stack([held_out[start : start + WINDOW] for start in starts.tolist()])
    bits = {
        "uncached": nats(model, windows, cached=False),
        "cache of every visit": nats(model, windows, cached=True),
        "share_last_kv": nats(shared, windows, cached=True),
    }
    found = {name: value.mean().item() / math.log(2) for name, value in bits.items()}
    difference = (bits["share_last_kv"] - bits["uncached"]) / math.log(2)
    return {
        "bits_per_byte": {name: round(value, 4) for name, value in found.items()},
        "cost_of_share_last_kv": round(difference.mean().item(), 4),
        "standard_error": round(difference.mean(dim=1).std().item() / math.sqrt(count), 4),
        "cache_bytes_per_token": {
            "cache of every visit": cost(spec).cache_bytes_per_token(),
            "share_last_kv": cost(shared.model.spec).cache_bytes_per_token(),
        },
    }


def texts() -> tuple[bytes, bytes]:
    """Bundled text to train on and held-out text, apart by file."""
    from ouroboros.config import DataSpec
    from ouroboros.data.documents import read_documents
    from ouroboros.data.sources import parse_source
    from ouroboros.data.splits import split_documents

    spec = DataSpec()
    splits = split_documents(read_documents(parse_source("python:"), spec), spec.valid_fraction, spec.test_fraction)
    train, test = (
        b"\n".join(span.document.data[span.start : span.end] for span in part) for part in (splits.train, splits.test)
    )
    return train, test


def train(model: OuroborosForCausalLM, data: Tensor, seconds: float) -> float:
    """Random windows until the time is over; the last loss in nats per byte."""
    import torch

    from ouroboros.config import OptimSpec
    from ouroboros.optim import build_optimizers, learning_rate, set_learning_rate

    model.train()
    spec = OptimSpec(lr=1e-2, embedding_lr=2e-2)
    optimizers = build_optimizers(model, spec)
    generator = torch.Generator().manual_seed(0)
    start = time.perf_counter()
    value = math.nan
    while (elapsed := time.perf_counter() - start) < seconds:
        set_learning_rate(optimizers, learning_rate(elapsed / seconds, spec))
        at = torch.randint(0, len(data) - WINDOW - 1, (4,), generator=generator)
        batch = torch.stack([data[i : i + WINDOW + 1] for i in at.tolist()])
        loss = cross_entropy(model(batch[:, :-1], use_cache=False).logits, batch[:, 1:])
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        value = loss.item()
    model.eval()
    return value


def nats(model: OuroborosForCausalLM, windows: Tensor, *, cached: bool) -> Tensor:
    """Negative log-likelihood of every byte after the prompt, (windows, WINDOW - PROMPT)."""
    import torch

    with torch.no_grad():
        if cached:
            output = model(windows[:, :PROMPT], use_cache=True)
            parts = [output.logits[:, -1:]]
            for position in range(PROMPT, WINDOW - 1):
                token = windows[:, position : position + 1]
                parts.append(model(token, past_key_values=output.past_key_values).logits)
            logits = torch.cat(parts, dim=1)
        else:
            logits = model(windows, use_cache=False).logits[:, PROMPT - 1 : -1]
    scores = logits.float().log_softmax(dim=-1)
    return -scores.gather(-1, windows[:, PROMPT:, None]).squeeze(-1)


if __name__ == "__main__":
    main()
