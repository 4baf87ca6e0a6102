"""GGUF files as llama.cpp reads them: what settings and tokenizers are called there, and files that are whole."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ouroboros.config import fields_by_path
from ouroboros.convert.gguf_form import Form, stored
from ouroboros.errors import OuroborosError, check
from ouroboros.files import replacing

if TYPE_CHECKING:
    from torch import Tensor

    from ouroboros.config import ModelSpec, RopeSpec
    from ouroboros.data.tokenize import TextTokenizer

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
"""Kinds of tokens: ordinary ones, those that no text is read as, and added ones that are matched whole."""


class Ends(NamedTuple):
    """Ids of the tokens that begin and end a text; None: as the tokenizer says."""

    first: int | None = None
    last: int | None = None


AS_THE_TOKENIZER_SAYS = Ends()

_SPLIT_BY_DIGIT = {"type": "Digits", "individual_digits": True}


def needs_gguf(path: Path, what: str) -> None:
    """Refuse where the packages of the extra ``gguf`` are not installed; ``what`` names the task."""
    from importlib.util import find_spec

    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    check(not missing, f"{path}: {what} GGUF needs {' and '.join(missing)}: pip install 'ouroboros-lm[gguf]'")


@contextlib.contextmanager
def new_file(out: Path) -> Iterator[Path]:
    """A temporary file to write, which becomes ``out`` when the body ends without an error.

    Raises:
        OuroborosError: ``out`` exists or cannot be written.
    """
    check(not out.exists(), f"{out} exists; choose another path")
    try:
        with replacing(out) as work:
            yield work
    except OSError as error:
        raise OuroborosError(f"cannot write {out}: {error.strerror or error}") from None


def writer_of(path: Path, architecture: str) -> Any:
    """A ``gguf.GGUFWriter`` that also writes empty lists, such as the merges of a tokenizer of bytes."""
    import gguf

    class Writer(gguf.GGUFWriter):
        def _pack_val(self, val: Any, vtype: Any, add_vtype: bool, sub_type: Any = None) -> bytes:
            if vtype == gguf.GGUFValueType.ARRAY and len(val) == 0:
                kind = struct.pack("<I", vtype) if add_vtype else b""
                return kind + struct.pack("<IQ", gguf.GGUFValueType.STRING, 0)
            return super()._pack_val(val, vtype, add_vtype, sub_type)

    return Writer(path, architecture)


def finish(writer: Any) -> None:
    """Write what was given to ``writer``, and close it."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write(
    path: Path,
    form: Form,
    spec: ModelSpec,
    state: Mapping[str, Tensor],
    tokenizer: TextTokenizer | None,
    *,
    ends: Ends = AS_THE_TOKENIZER_SAYS,
    more: Mapping[str, int | bool] | None = None,
) -> str:
    """Write a model as a GGUF file, and return what its matrices are stored as.

    Args:
        path: the file.
        form: what llama.cpp knows it as.
        spec: what the form computes, without a stem.
        state: its tensors, float32. Without an output matrix the embedding is it.
        tokenizer: None leaves it out.
        ends: tokens that begin and end a text, where the tokenizer does not say.
        more: further keys of the architecture.

    Raises:
        OuroborosError: GGUF has no place for the tokenizer.
    """
    import gguf
    import torch

    kinds = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
    matrices = [tensor for tensor in state.values() if tensor.ndim > 1]
    dtype = next(kind for kind in kinds if all(x.to(kind).to(x.dtype).equal(x) for x in matrices))
    writer = writer_of(path, form.name)
    _add_settings(writer, spec)
    for name, value in (more or {}).items():
        (writer.add_bool if isinstance(value, bool) else writer.add_uint32)(f"{form.name}.{name}", value)
    add_tokenizer(writer, spec.vocab_size, tokenizer, ends)
    rotary = spec.block.mixer.rotary(spec.hidden_size)
    tensors = dict(stored(form, spec, state))
    if rotary is not None and rotary[0].slowing != 1:
        tensors["rope_freqs.weight"] = _slowed(*rotary)
    for name, tensor in tensors.items():
        kept = tensor.detach().to(dtype if tensor.ndim > 1 else torch.float32).contiguous()
        kind = gguf.GGMLQuantizationType[kinds[kept.dtype]]
        bits = kept.view(torch.int16) if kept.dtype == torch.bfloat16 else kept  # numpy has no bfloat16
        writer.add_tensor(name, bits.numpy(), raw_dtype=kind)
    finish(writer)
    return str(dtype).removeprefix("torch.")


def _add_settings(writer: Any, spec: ModelSpec) -> None:
    """The keys that every architecture has."""
    import gguf

    heads = spec.block.mixer.heads(spec.hidden_size)
    writer.add_context_length(spec.max_position_embeddings)
    writer.add_embedding_length(spec.hidden_size)
    writer.add_block_count(len(spec.blocks))
    writer.add_feed_forward_length(fields_by_path(spec.block)["ffn.intermediate_size"])
    writer.add_head_count(heads.queries)
    writer.add_head_count_kv(heads.cached)
    writer.add_key_length(heads.width)
    writer.add_value_length(heads.width)
    writer.add_layer_norm_rms_eps(spec.block.norm.eps)
    writer.add_vocab_size(spec.vocab_size)
    if rotary := spec.block.mixer.rotary(spec.hidden_size):
        rope, channels = rotary
        writer.add_rope_dimension_count(rope.rotated(channels))
        writer.add_rope_freq_base(rope.base)
        if rope.scale != 1:
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(rope.scale)


def _slowed(rope: RopeSpec, channels: int) -> Tensor:
    """What llama.cpp divides the plain frequencies by, (P,)."""
    from ouroboros.nn.rope import Rope

    plain, slow = (Rope(spec, channels).frequencies() for spec in (dataclasses.replace(rope, slowing=1.0), rope))
    return plain / slow


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that :func:`write` wrote, float32, by the names of llama.cpp."""
    import gguf
    import torch

    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        found[tensor.name] = values.reshape(*map(int, reversed(tensor.shape)))
    return found


def add_tokenizer(writer: Any, entries: int, tokenizer: TextTokenizer | None, ends: Ends) -> None:
    """The keys ``tokenizer.ggml.*``; without a tokenizer those that say that there is none."""
    if tokenizer is None:
        writer.add_tokenizer_model("no_vocab")
        return
    import gguf

    state = json.loads(tokenizer.backend.to_str())
    split = _split_of(state)
    added = {token["id"]: CONTROL if token["special"] else USER_DEFINED for token in state["added_tokens"]}
    found = {index: token for token, index in tokenizer.backend.get_vocab(with_added_tokens=True).items()}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    # Spare rows of an embedding that was rounded up need a token each, which no text is read as.
    writer.add_token_list([found.get(index, f"<|unused{index}|>") for index in range(entries)])
    writer.add_token_types([added.get(i, NORMAL) if i in found else CONTROL for i in range(entries)])
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in state["model"]["merges"]]
    writer.add_key_value(gguf.Keys.Tokenizer.MERGES, merges, gguf.GGUFValueType.ARRAY)
    first = tokenizer.eos_id if ends.first is None else ends.first
    writer.add_bos_token_id(first)
    writer.add_eos_token_id(tokenizer.eos_id if ends.last is None else ends.last)
    # This library begins a text with the token that ends one, other tokenizers with what they add themselves.
    writer.add_add_bos_token(first == tokenizer.eos_id or tokenizer.hf("a").input_ids[0] == first)
    if tokenizer.hf.chat_template is not None:
        writer.add_chat_template(tokenizer.hf.chat_template)


def _split_of(state: Mapping[str, Any]) -> str:
    """What llama.cpp calls the way in which this tokenizer cuts a text before it merges bytes.

    Raises:
        OuroborosError: it is no tokenizer of bytes or byte-level BPE, or llama.cpp has no name for its way.
    """
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    fix = "write the model alone with --no-tokenizer"
    before = state["pre_tokenizer"] or {}
    steps = before.get("pretokenizers", [before])
    whole = state["model"]["type"] == "BPE" and bool(steps) and steps[-1].get("type") == "ByteLevel"
    check(whole and not state["normalizer"], f"the tokenizer is neither of bytes nor byte-level BPE; for GGUF, {fix}")
    last, others = steps[-1], steps[:-1]
    plain = not last["add_prefix_space"]
    if not state["model"]["merges"] and plain:
        return "qwen2"  # single bytes are the same however the text is cut, and this name leaves spaces as they are
    if plain and last["use_regex"] and others in ([], [_SPLIT_BY_DIGIT]):
        return "smollm" if others else "gpt-2"
    patterns = [step.get("pattern", {}).get("Regex") for step in others if step.get("behavior") == "Isolated"]
    known = {pattern: name for name, pattern in reversed(GGUF_PRE_TOKENIZER_SPLITS.items())}
    named = plain and not last["use_regex"] and len(others) == len(patterns) == 1 and patterns[0] in known
    check(
        named,
        f"llama.cpp has no name for the way in which this tokenizer cuts a text before it merges; {fix}, or train with"
        " a vocabulary that it knows (--data.tokenizer bpe-qwen:N)",
    )
    return known[patterns[0]]
