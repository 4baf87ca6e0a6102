"""Stacks that are repeated: read from both kinds of files, and compared with what a repeated stack computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import LlamaForCausalLM

from ouroboros.config import ModelSpec
from ouroboros.convert import donors
from ouroboros.convert.families import family_of, spec_of
from ouroboros.convert.gguf_file import write
from ouroboros.convert.gguf_form import NANBEIGE, Form
from ouroboros.convert.nanbeige import repeat
from ouroboros.convert.readers import convert
from ouroboros.data.tokenize import byte_tokenizer
from ouroboros.errors import OuroborosError
from ouroboros.model.reading import load_model

TOKENS = torch.randint(0, 257, (2, 20), generator=torch.Generator().manual_seed(1))


def repeated(llama: LlamaForCausalLM, loops: int, skips_norm: bool) -> torch.Tensor:
    """The logits of a stack that runs several times: what one run returns, which is normalised, enters the next."""
    norm, x = llama.model.norm, llama.model.embed_tokens(TOKENS)
    for loop in range(loops):
        llama.model.norm = torch.nn.Identity() if skips_norm and loop < loops - 1 else norm
        x = llama.model(inputs_embeds=x, use_cache=False).last_hidden_state
    return llama.lm_head(x)


def layers_of(llama: LlamaForCausalLM) -> tuple[Form, ModelSpec, dict[str, torch.Tensor]]:
    """The form, the layers that are repeated, and their tensors."""
    return NANBEIGE, spec_of(llama.config), donors.tensors_of(family_of("llama"), llama)


def settings_of(source: Path, **values: Any) -> dict[str, Any]:
    """The configuration of a donor, changed."""
    path = source / "config.json"
    found = {**json.loads(path.read_bytes()), **values}
    path.write_text(json.dumps(found))
    return found


@pytest.mark.parametrize("form", ["directory", "gguf"])
@pytest.mark.parametrize("skips_norm", [True, False])
def test_a_repeated_stack_is_one_loop(make: Any, tmp_path: Path, form: str, skips_norm: bool) -> None:
    source = make("llama", num_hidden_layers=2)
    llama = LlamaForCausalLM.from_pretrained(source).eval()
    more = {"num_loops": 3, "skip_loop_final_norm": skips_norm}
    settings_of(source, model_type="nanbeige", architectures=["NanbeigeForCausalLM"], auto_map={"x": "y"}, **more)
    if form == "gguf":
        source = tmp_path / "x.gguf"
        write(source, *layers_of(llama), byte_tokenizer(), more=more)
    made = convert(source, tmp_path / "out")
    assert made.system == "Nanbeige" and made.sizes["layout"] == "(2)x3" and made.sizes["identity"] and made.tokenizer
    model = load_model(tmp_path / "out")
    with torch.no_grad():
        want = repeated(llama, 3, skips_norm)
        torch.testing.assert_close(model(TOKENS).logits, want, rtol=0, atol=1e-5 * want.abs().max().item())
        other = repeated(llama, 3, not skips_norm)
    assert (other - want).abs().max() > 0.01 * want.abs().max()
    record = json.loads((tmp_path / "out" / donors.RECORD).read_bytes())
    assert record["model_type"] == "nanbeige" and record["num_loops"] == 3
    with pytest.raises(OuroborosError, match=r"runs its layers several times already, as layout '\(2\)x3' says: leave"):
        convert(source, tmp_path / "other", layout="1 (1)x2")


def test_one_run_is_a_plain_stack(make: Any, tmp_path: Path) -> None:
    source = make("llama")
    settings_of(source, model_type="nanbeige", num_loops=1)
    assert convert(source, tmp_path / "out").sizes["layout"] == "4"


def test_the_repeated_llama_is_what_it_stands_for(make: Any) -> None:
    """What a model is compared with on the way in and out."""
    for skips_norm in (True, False):
        llama = LlamaForCausalLM.from_pretrained(make("llama")).eval()
        with torch.no_grad():
            want = repeated(llama, 2, skips_norm)
            found = repeat(llama, 2, skips_norm=skips_norm)(TOKENS, use_cache=False).logits
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"loop_share_kv": True}, "loop_share_kv: True is not supported; only models without it are read"),
        ({"num_loops": 0}, "donor: num_loops must be a whole number from 1 to 1000, and is 0"),
        ({"num_loops": "2"}, "num_loops must be a whole number from 1 to 1000, and is '2'"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu' is none of the activations"),
    ],
)
def test_what_is_no_repeated_stack_is_refused(make: Any, values: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = make("llama").rename(tmp_path / "donor")
    settings_of(source, **{"model_type": "nanbeige", "num_loops": 2, **values})
    with pytest.raises(OuroborosError, match=message):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_that_are_damaged_or_say_too_little(make: Any, tmp_path: Path) -> None:
    llama, path = LlamaForCausalLM.from_pretrained(make("llama")), tmp_path / "x.gguf"
    write(path, *layers_of(llama), None)
    with pytest.raises(OuroborosError, match=r"x.gguf: has no nanbeige.num_loops, which says how often"):
        donors.find(path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(OuroborosError, match=r"^\S*x.gguf: cannot be read: it is damaged or cut short \(.*\)$"):
        donors.find(path)


def test_quantised_tensors_are_copied_as_they_are(make: Any, tmp_path: Path) -> None:
    """Blocks of 32 numbers, as llama.cpp's tools leave them."""
    path, options = tmp_path / "x.gguf", {"hidden_size": 32, "intermediate_size": 64, "head_dim": 8}
    llama = LlamaForCausalLM.from_pretrained(make("llama", **options)).eval()
    write(tmp_path / "whole.gguf", *layers_of(llama), None, more={"num_loops": 2})
    reader, writer = gguf.GGUFReader(tmp_path / "whole.gguf"), gguf.GGUFWriter(path, "nanbeige")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            writer.add_key_value(name, field.contents(), field.types[0])
    kind = gguf.GGMLQuantizationType.Q8_0
    for tensor in reader.tensors:
        is_matrix = tensor.data.ndim > 1
        data = gguf.quantize(tensor.data, kind) if is_matrix else tensor.data
        writer.add_tensor(tensor.name, data, raw_dtype=kind if is_matrix else tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    made = convert(path, tmp_path / "out", no_tokenizer=True)
    want, found = llama.model.layers[1].mlp.up_proj.weight, made.model.model.decoder.layers[1].mlp.up_proj.weight
    assert 0 < (found - want).abs().max() < 0.01 * want.abs().max()
