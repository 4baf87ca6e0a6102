"""Exact cost of a model from its specification alone: parameters, arithmetic, cache.

Parameters are a sum over blocks, arithmetic and cache sums over visits. The harness
(:mod:`ouroboros.eval.harness`) proves every number against the built model.
Arithmetic counts a multiply-add as two operations and matrix products only, as ``FlopCounterMode`` does.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ouroboros.config import (
    AttentionSpec,
    BottleneckAttentionSpec,
    FeedForwardSpec,
    LatentAttentionSpec,
    MixerSpec,
    ModelSpec,
    OsamSpec,
)
from ouroboros.schedule import Schedule, parse

CHUNK, FADING_CHUNK = 128, 64
"""Tokens that a constant-size memory works on at a time, without and with decay: with decays of at most 1 per token the
powers within a chunk stay far inside float32."""
BAND = 16
"""Coordinates of one band of a bilinear map: where it is symmetric, only products of a band with itself and with later
coordinates are formed."""


def direct_is_faster(width: int, buckets: int, *, symmetric: bool) -> bool:
    """Whether a map behind the convolution of two sketches works on products of coordinates, or on spectra: a product
    costs about a third of a bucket (measured: docs/benchmarks.md)."""
    return bilinear_columns(width, symmetric=symmetric) <= 3 * buckets


def bilinear_columns(width: int, *, symmetric: bool) -> int:
    """Products of two vectors' coordinates that a bilinear map forms: all, or where it is symmetric bands of them."""
    if not symmetric:
        return width * width
    return sum(min(BAND, width - low) * (width - low) for low in range(0, width, BAND))


@dataclass(frozen=True)
class Cost:
    """What a model stores, computes and remembers."""

    parameters: int
    embedding_parameters: int
    """Share of ``parameters`` in the token embedding and the untied head."""
    flops_per_token: int
    """Forward operations for one token that attends to ``context`` positions."""
    training_flops_per_token: int
    """Forward and backward, three times the forward."""
    cache_values_per_token: int
    """Numbers a cache gains with each token."""
    state_values: int
    """Numbers of constant-size state per sequence."""
    context: int

    def cache_bytes_per_token(self, bytes_per_value: int = 4) -> int:
        return self.cache_values_per_token * bytes_per_value

    def state_bytes(self, bytes_per_value: int = 4) -> int:
        return self.state_values * bytes_per_value


def cost(spec: ModelSpec, *, context: int = 512, loops: int | None = None) -> Cost:
    """The exact cost of ``spec`` when a token attends to ``context`` positions, registers not counted.

    Args:
        spec: the model.
        context: attended positions; a causal window of T tokens has (T + 1) / 2 on average.
        loops: another loop count than the layout's.
    """
    schedule = parse(spec.layout)
    run = schedule if loops is None else schedule.with_loops(loops)
    embeddings = spec.vocab_size * spec.hidden_size * (1 if spec.tie_embeddings else 2)
    parameters = embeddings + schedule.num_blocks * block_parameters(spec) + norm_parameters(spec)
    parameters += spec.registers * spec.hidden_size + loop_parameters(spec, schedule)
    parameters += compressor_parameters(spec) + expansion_parameters(spec)
    parameters += spec.max_position_embeddings * spec.hidden_size if spec.positions == "learned" else 0
    if isinstance(spec.mixer, OsamSpec) and spec.registers:  # which positions read is then told by the call
        spec = dataclasses.replace(spec, mixer=dataclasses.replace(spec.mixer, kupdate=1))
    seen = context if isinstance(spec.mixer, OsamSpec) else context + spec.registers  # of which a state remains
    flops = run.num_visits * block_flops(spec, seen) + loop_flops(spec, run)
    flops += 2 * spec.vocab_size * spec.hidden_size
    return Cost(
        parameters=parameters,
        embedding_parameters=embeddings,
        flops_per_token=flops,
        training_flops_per_token=3 * flops,
        cache_values_per_token=cached_visits(spec, run) * cache_values(spec),
        state_values=filter_values(spec, run) + cached_visits(spec, run) * memory_values(spec.mixer, spec.hidden_size),
        context=context,
    )


def cached_visits(spec: ModelSpec, schedule: Schedule) -> int:
    """Cache entries that are filled: one per visit, or one per block with ``share_last_kv``."""
    return schedule.num_blocks if spec.loop.share_last_kv else schedule.num_visits


def filter_values(spec: ModelSpec, schedule: Schedule) -> int:
    """Numbers that filters over tokens remember per sequence: one fewer entries than a filter has taps.

    Each cache entry's own filters, and those of the embeddings and of what the head reads.
    """
    delta, d = spec.delta, spec.hidden_size
    visit, outer = shift_values(spec.mixer, d), 0
    if spec.residual == "delta" and delta.expanded:
        compressor = (delta.kernel - 1) * delta.values * d if delta.compressor == "token" else 0
        visit += 2 * compressor  # before the mixer and before the feed-forward network
        outer += compressor + ((delta.embedding_kernel - 1) * d if delta.embedding_conv else 0)
    return cached_visits(spec, schedule) * visit + outer


def block_parameters(spec: ModelSpec) -> int:
    """Parameters of one block."""
    sublayers = 1 if spec.ffn.kind == "none" else 2
    norms = {"final": 0, "pre": 1, "sandwich": 2}[spec.norm.placement]
    return (
        mixer_parameters(spec.mixer, spec.hidden_size)
        + ffn_parameters(spec.ffn, spec.hidden_size)
        + sublayers * (norms * norm_parameters(spec) + residual_parameters(spec))
        + compressor_parameters(spec)
    )


def norm_parameters(spec: ModelSpec) -> int:
    """Parameters of one norm of the stream."""
    return spec.hidden_size * (1 if spec.norm.kind == "rms" else 2)


def block_flops(spec: ModelSpec, context: int) -> int:
    """Operations of one visit for one token that attends to ``context`` positions."""
    total = mixer_flops(spec.mixer, spec.hidden_size, context) + ffn_flops(spec.ffn, spec.hidden_size)
    return total + (1 if spec.ffn.kind == "none" else 2) * residual_flops(spec)


def residual_parameters(spec: ModelSpec) -> int:
    """Parameters of one residual connection."""
    if spec.residual == "additive":
        return 0
    delta, d = spec.delta, spec.hidden_size
    gate = d + 1 if delta.gate == "linear" else (d + 1) * delta.gate_hidden + 1
    return gate + ((d + 1) * delta.values if delta.value != "constant" else 0)


def residual_flops(spec: ModelSpec) -> int:
    """Operations of one residual connection for one token, those of its matrix products."""
    if spec.residual == "additive":
        return 0
    delta, d = spec.delta, spec.hidden_size
    gate = d if delta.gate == "linear" else (d + 1) * delta.gate_hidden
    erased = d * delta.values if delta.expanded and delta.erase else 0  # of a vector state an elementwise sum
    return 2 * (gate + (d * delta.values if delta.value != "constant" else 0) + erased)


def compressor_parameters(spec: ModelSpec) -> int:
    """Parameters of what reads an expanded state."""
    delta = spec.delta
    if spec.residual == "additive" or not delta.expanded:
        return 0
    filters = spec.hidden_size * delta.kernel * (delta.values if delta.compressor == "token" else 1)
    return filters + delta.values


def expansion_parameters(spec: ModelSpec) -> int:
    """Parameters of what starts an expanded state."""
    delta = spec.delta
    if spec.residual == "additive" or not (delta.expanded and delta.embedding_conv):
        return 0
    return spec.hidden_size * delta.values * delta.embedding_kernel


def mixer_parameters(mixer: MixerSpec, hidden_size: int) -> int:
    """Parameters of one mixer."""
    matrices, vectors = _mixer_weights(mixer, hidden_size)
    return matrices + vectors


def mixer_flops(mixer: MixerSpec, hidden_size: int, context: int) -> int:
    """Operations of a mixer for one token that attends to ``context`` positions, keys and values built from latents."""
    if isinstance(mixer, OsamSpec):
        return _osam_flops(mixer, hidden_size, context)
    keys = values = mixer.num_heads * mixer.width(hidden_size)
    if isinstance(mixer, LatentAttentionSpec):
        # The rotary channels are added to the keys, and the values padded to their width for the fused kernels.
        keys = values = keys + mixer.num_heads * mixer.rotary_width(hidden_size)
    return 2 * _mixer_weights(mixer, hidden_size)[0] + 2 * context * (keys + values)


def rebuild_flops(mixer: MixerSpec, hidden_size: int) -> int:
    """Operations that make keys and values of one position whose latent alone is remembered; 0 if they are kept."""
    if isinstance(mixer, (AttentionSpec, OsamSpec)) or (
        isinstance(mixer, BottleneckAttentionSpec) and mixer.cache != "latent"
    ):
        return 0
    return 2 * mixer.rank(hidden_size) * 2 * mixer.num_heads * mixer.width(hidden_size)


def _mixer_weights(mixer: MixerSpec, hidden_size: int) -> tuple[int, int]:
    """Parameters in matrices, which each token meets once, and in vectors."""
    if isinstance(mixer, OsamSpec):
        return _osam_weights(mixer, hidden_size)
    if isinstance(mixer, LatentAttentionSpec):
        return _latent_weights(mixer, hidden_size)
    width = mixer.width(hidden_size)
    queries = mixer.num_heads * width
    norms = 2 * width if mixer.qk_norm != "none" else 0
    if isinstance(mixer, BottleneckAttentionSpec):
        return mixer.rank(hidden_size) * (2 * hidden_size + 3 * queries) + queries * hidden_size, norms
    keys = mixer.kv_heads * width
    biases = ((queries + 2 * keys) if mixer.qkv_bias else 0) + (hidden_size if mixer.out_bias else 0)
    gains = mixer.num_heads if mixer.query_gain is not None else 0
    gains += width if mixer.normalises_heads else 0
    gates = mixer.kv_heads * (mixer.k_shift + mixer.v_shift) + (queries if mixer.output_gate else 0)
    return hidden_size * (queries + 2 * keys + gates) + queries * hidden_size, norms + biases + gains


def memory_values(mixer: MixerSpec, hidden_size: int) -> int:
    """Numbers of the state that one visit's mixer carries per sequence: sums of keys, and of keys times values."""
    if not isinstance(mixer, OsamSpec):
        return 0
    return 2 * hidden_size * (hidden_size + 1) if mixer.value_path else 2 * hidden_size


def shift_values(mixer: MixerSpec, hidden_size: int) -> int:
    """Numbers that one visit's mixer remembers per sequence for its shifts: the last keys and values."""
    if not isinstance(mixer, AttentionSpec):
        return 0
    return (mixer.k_shift + mixer.v_shift) * mixer.kv_heads * mixer.width(hidden_size)


def _osam_weights(mixer: OsamSpec, hidden_size: int) -> tuple[int, int]:
    d, hidden = hidden_size, mixer.readout_hidden
    matrices = 2 * d * d + hidden * (mixer.buckets + d)
    numbers = 3 + mixer.frequencies * (2 if mixer.decay else 1)  # two phases and a gate
    vectors = hidden + d + numbers
    if mixer.value_path:
        matrices, vectors = matrices + 3 * d * d, vectors + 4 * d + 1
    return matrices, vectors


def _osam_flops(mixer: OsamSpec, hidden_size: int, context: int) -> int:
    """Of the form that training uses: products of coordinates times a gathered matrix, or spectra times a folded one.

    A token meets those of its chunk, and behind the first chunk the state.
    """
    d, most = hidden_size, FADING_CHUNK if mixer.decay else CHUNK
    chunk = min(context, most)
    symmetric = not mixer.independent_hashes and d > BAND
    if direct_is_faster(d, mixer.buckets, symmetric=symmetric):
        read = bilinear_flops(d, mixer.readout_hidden, symmetric=symmetric)
    else:
        read = 2 * (2 * (mixer.buckets // 2 + 1)) * mixer.readout_hidden
    read += 2 * d * d  # queries
    look, total = 2 * chunk * 2 * d, 2 * d * d + 2 * mixer.readout_hidden * d  # sums of keys
    if mixer.value_path:
        read += 2 * 2 * d * d + (2 * 2 * d * d if mixer.sketch_values else 0)
        look += 2 * chunk * 3 * d
        total += 2 * d * d
    if context > most:
        write, between = state_flops(mixer, d)
        total, look = total + write, look + between
    reads = -(-context // mixer.kupdate)
    looks = context if mixer.decay and most < min(mixer.kupdate, context) else reads
    return total + (read * reads + look * looks) // context


def bilinear_flops(width: int, outputs: int, *, symmetric: bool) -> int:
    """Operations of a bilinear map of two complex vectors, of which a symmetric one forms bands of products alone."""
    return 2 * bilinear_columns(width, symmetric=symmetric) * ((4 if symmetric else 2) + outputs)


def state_flops(mixer: MixerSpec, hidden_size: int) -> tuple[int, int]:
    """Operations of one token that add it to a state of constant size, and that read the state in front of a chunk."""
    if not isinstance(mixer, OsamSpec):
        return 0, 0
    d = hidden_size
    return (2 * 2 * d * d, 2 * 2 * d * d) if mixer.value_path else (0, 0)


def _latent_weights(mixer: LatentAttentionSpec, hidden_size: int) -> tuple[int, int]:
    width, rotary = mixer.num_heads * mixer.width(hidden_size), mixer.rotary_width(hidden_size)
    rank, query_rank = mixer.rank(hidden_size), mixer.latent_of_queries(hidden_size)
    queries = width + mixer.num_heads * rotary
    matrices = query_rank * (hidden_size + queries) if query_rank else hidden_size * queries
    matrices += hidden_size * (rank + rotary) + rank * 2 * width + width * hidden_size
    return matrices, query_rank + rank


def ffn_matrices(ffn: FeedForwardSpec) -> int:
    """Weight matrices of a feed-forward network."""
    return {"swiglu": 3, "none": 0}.get(ffn.kind, 2)


def ffn_parameters(ffn: FeedForwardSpec, hidden_size: int) -> int:
    """Parameters of one feed-forward network."""
    matrices = ffn_matrices(ffn)
    bias = (matrices - 1) * ffn.intermediate_size + hidden_size if ffn.bias and matrices else 0
    return matrices * hidden_size * ffn.intermediate_size + bias


def ffn_flops(ffn: FeedForwardSpec, hidden_size: int) -> int:
    """Operations of a feed-forward network for one token."""
    return 2 * ffn_matrices(ffn) * hidden_size * ffn.intermediate_size


def cache_values(spec: ModelSpec) -> int:
    """Numbers one cache entry gains with each token."""
    mixer, hidden_size = spec.mixer, spec.hidden_size
    if isinstance(mixer, OsamSpec):
        return 0
    if isinstance(mixer, LatentAttentionSpec):
        return mixer.rank(hidden_size) + mixer.rotary_width(hidden_size)
    if isinstance(mixer, BottleneckAttentionSpec) and mixer.cache == "latent":
        return mixer.rank(hidden_size)
    return 2 * mixer.cached_heads() * mixer.width(hidden_size)


def loop_parameters(spec: ModelSpec, schedule: Schedule) -> int:
    """Parameters of the loop parts, summed over looped segments."""
    d, loop = spec.hidden_size, spec.loop
    total = 0
    for segment in schedule.segments:
        if not segment.looped:
            continue
        rows = loop.max_loops or segment.loops
        total += rows * d * (loop.norm + loop.embedding)
        total += {"none": 0, "add": d, "concat": 2 * d * d}[loop.inject]
        total += (2 * d * d + d) if loop.gate else 0
    return total


def loop_flops(spec: ModelSpec, schedule: Schedule) -> int:
    """Operations of the loop parts for one token: every value channel of an expanded state is mapped by itself."""
    d, loop = spec.hidden_size, spec.loop
    channels = spec.delta.values if spec.residual == "delta" else 1
    per_loop = (4 * d * d if loop.inject == "concat" else 0) + (4 * d * d if loop.gate else 0)
    return channels * sum(per_loop * segment.loops for segment in schedule.segments if segment.looped)


def describe(spec: ModelSpec, *, context: int = 512) -> str:
    """The drawing that ``ouroboros show`` prints: one line per segment, then the costs."""
    schedule = parse(spec.layout)
    total = cost(spec, context=context)
    lines = [f"layout {schedule.notation}: {schedule.num_blocks} blocks, {schedule.num_visits} visits", ""]
    lines.append(f"  tokens ({spec.vocab_size})")
    lines.append("    |")
    for segment in schedule.segments:
        names = [f"[{block}]" for block in segment.blocks]
        shown = "-".join(names) if len(names) <= 8 else f"{names[0]}-..-{names[-1]}"
        lines.append(f"    {shown}")
        if segment.looped:
            lines.append(f"    ^{'_' * (len(shown) - 2)}|  x {segment.loops}")
        lines.append("    |")
    lines.append("  logits")
    lines.append("")
    bits6 = total.parameters * 6 / 8
    lines += [
        f"parameters           {total.parameters:>14,}  ({total.embedding_parameters:,} in embeddings)",
        f"FLOPs/token          {total.flops_per_token:>14,}  forward, attending to {context} positions",
        f"FLOPs/token, training{total.training_flops_per_token:>14,}",
        f"cache bytes/token    {total.cache_bytes_per_token():>14,}  float32, {cached_visits(spec, schedule)} entries",
        f"state bytes/sequence {total.state_bytes():>14,}",
        f"bytes at 6 bits      {bits6:>14,.0f}  before compression",
    ]
    return "\n".join(lines)
