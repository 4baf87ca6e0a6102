"""GGUF files as llama.cpp reads them: what a Llama and its tokenizer are called there, and files that are whole.

Names of tensors and keys are those of the package ``gguf``. Rows of the query and key maps stand in the order of
llama.cpp, whose rotation pairs neighbouring channels where transformers pairs halves of a head.
"""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ouroboros.errors import OuroborosError, check
from ouroboros.files import replacing

if TYPE_CHECKING:
    from torch import Tensor

    from ouroboros.data.tokenize import TextTokenizer

LLAMA = "llama"
"""What llama.cpp calls the architecture whose names of tensors and keys are used here."""
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
"""Kinds of tokens: ordinary ones, those that no text is read as, and added ones that are matched whole."""
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
    architecture: str,
    config: Any,
    state: Mapping[str, Tensor],
    tokenizer: TextTokenizer | None,
    more: Mapping[str, int | bool],
) -> str:
    """Write a model of the kind of Llama as a GGUF file, and return what its matrices are stored as.

    Args:
        path: the file.
        architecture: as llama.cpp calls it.
        config: of transformers, of Llama.
        state: its tensors under the names of transformers, float32. Without an output matrix the embedding is it.
        tokenizer: None leaves it out.
        more: keys of the architecture beside those of Llama.

    Raises:
        OuroborosError: GGUF has no place for the tokenizer.
    """
    import gguf
    import torch

    kinds = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
    matrices = [tensor for tensor in state.values() if tensor.ndim > 1]
    dtype = next(kind for kind in kinds if all(x.to(kind).to(x.dtype).equal(x) for x in matrices))
    writer = writer_of(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    for name, value in more.items():
        (writer.add_bool if isinstance(value, bool) else writer.add_uint32)(f"{architecture}.{name}", value)
    _add_tokenizer(writer, config, tokenizer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj.weight": config.num_attention_heads, "k_proj.weight": config.num_key_value_heads}
    for name, tensor in state.items():
        if count := heads.get(".".join(name.split(".")[-2:])):
            tensor = tensor.unflatten(0, (count, 2, -1)).transpose(1, 2).reshape(tensor.shape)
        stored = tensor.detach().to(dtype if tensor.ndim > 1 else torch.float32).contiguous()
        kind = gguf.GGMLQuantizationType[kinds[stored.dtype]]
        bits = stored.view(torch.int16) if stored.dtype == torch.bfloat16 else stored  # numpy has no bfloat16
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), bits.numpy(), raw_dtype=kind)
    finish(writer)
    return str(dtype).removeprefix("torch.")


def _add_tokenizer(writer: Any, config: Any, tokenizer: TextTokenizer | None) -> None:
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
    writer.add_token_list([found.get(index, f"<|unused{index}|>") for index in range(config.vocab_size)])
    writer.add_token_types([added.get(i, NORMAL) if i in found else CONTROL for i in range(config.vocab_size)])
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in state["model"]["merges"]]
    writer.add_key_value(gguf.Keys.Tokenizer.MERGES, merges, gguf.GGUFValueType.ARRAY)
    first = tokenizer.eos_id if config.bos_token_id is None else config.bos_token_id
    writer.add_bos_token_id(first)
    writer.add_eos_token_id(tokenizer.eos_id if config.eos_token_id is None else config.eos_token_id)
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
        return "gpt-2"  # single bytes are the same however the text is cut
    if plain and last["use_regex"] and others in ([], [_SPLIT_BY_DIGIT]):
        return "smollm" if others else "gpt-2"
    patterns = [step.get("pattern", {}).get("Regex") for step in others if step.get("behavior") == "Isolated"]
    known = {pattern: name for name, pattern in reversed(GGUF_PRE_TOKENIZER_SPLITS.items())}
    named = plain and not last["use_regex"] and len(others) == len(patterns) == 1 and patterns[0] in known
    check(named, f"llama.cpp has no name for the way in which this tokenizer cuts a text before it merges; {fix}")
    return known[patterns[0]]
