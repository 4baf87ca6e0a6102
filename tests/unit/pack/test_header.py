"""What a header may say: every claim that cannot be is refused with the name of its section or field."""

from __future__ import annotations

import json
import time

import pytest

from ouroboros.errors import OuroborosError
from ouroboros.pack.artifact import Artifact
from ouroboros.pack.header import LARGEST_HEADER, Section, kind_of

RANGE = "codes/6/range"


def refuse(data, message):
    """The file is refused at once, in one line that says this."""
    begun = time.perf_counter()
    with pytest.raises(OuroborosError, match=message) as caught:
        Artifact(data, "model.ouro").tensors()
    assert time.perf_counter() - begun < 2
    assert str(caught.value).startswith("model.ouro: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "header: not JSON"),
        (b"{", "header: not JSON"),
        (b"\xff\xfe", "header: not JSON"),
        (b"[]", "header: expected a JSON object, got list"),
        (b"7", "header: expected a JSON object, got int"),
        (b'{"a": 1, "a": 2}', "header: a key is given twice among 'a', 'a'"),
        (b'{"a": NaN}', "header: NaN is no number of JSON"),
        (b"[" * 1_000_000, "header: not JSON"),
        (b'{"a":' * 400_000, "header: not JSON"),
        (b"9" * 1_000_000, "header: not JSON"),
        (b" " * (LARGEST_HEADER + 1), "header: expands to more than"),
        (b'{"magic": 1}', "header: unknown key 'magic'"),
        (b"{}", "header: spec: Field required"),
    ],
)
def test_text_that_is_no_header(opened, text, message):
    refuse(opened().sealed(text), message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h.pop("facts"), "header: facts: Field required"),
        (lambda h: h.update(spec=[]), "header: spec: Input should be a valid dictionary"),
        (lambda h: h["spec"].update(layuot="1"), "spec.*unknown key 'layuot'; did you mean 'layout'"),
        (lambda h: h["spec"].update(layout=7), "spec: layout: expected text, got 7"),
        (lambda h: h["spec"].update(layout="1 1"), "tensors model.decoder.layers.1"),
        (lambda h: h["spec"].update(layout="100000"), r"spec: 100,000 blocks and \d+ tensors"),
        (lambda h: h["spec"].update(layout="(1)x999999999"), "spec: layout: .*999999999"),
        (lambda h: h["spec"].update(layout="(1)x20000"), "spec: 20,000 visits; a packed model has up to 10,000"),
        (lambda h: h["spec"].update(vocab_size=10**12), "spec: an embedding of .* numbers where all tensors have"),
        (lambda h: h["spec"].update(hidden_size=-16), "spec: .*hidden_size"),
        (lambda h: h["spec"]["block"]["mixer"].update(kind="os.system"), "spec.*unknown kind 'os.system'"),
        (lambda h: h["spec"].update(_attn_implementation_internal="x"), "unknown key '_attn_implementation_internal'"),
        (lambda h: h.update(eos_token_id=257), "eos_token_id: no token 257"),
        (lambda h: h["facts"]["score"].update(bits_per_byte=-1), "facts.score: bits_per_byte must be finite and >= 0"),
        (lambda h: h["facts"].update(score={"bits_per_byte": 1}), "facts.score.*: Field required"),
        (lambda h: h.update(sections={}), "header.sections: expected a list"),
        (lambda h: h["sections"].append(h["sections"][0]), f"section '{RANGE}|section 'codes/.* stands there twice"),
        (lambda h: h["sections"].pop(), "the sections have .* bytes and the file has"),
        (lambda h: h["sections"].insert(0, h["sections"].pop(1)), "begins at .* where the one before ends at 0"),
        (lambda h: h["sections"][1].update(offset=0), "begins at 0 where the one before ends at"),
        (lambda h: h["sections"][1].update(offset=2**70), "begins at 1180591620717411303424 where"),
        (lambda h: h["sections"][0].update(bytes=-5), "-5 bytes"),
        (lambda h: h["sections"][0].update(bytes=10**15), "section .* begins at .* where the one before ends at 10000"),
        (lambda h: h["sections"][-1].update(bytes=10**15), "have 1,000,.* bytes and the file has"),
        (lambda h: h["sections"][0].update(name="x"), "section 'x': unknown"),
        (lambda h: h["sections"][0].update(sha256="00"), r"damaged \(sha256 differs\)"),
        (lambda h: h["sections"][0].update(dtype="float16"), "unknown; its content is what a section 'unknown' holds"),
        (lambda h: h["sections"][0]["tensors"][0].update(bytes=0), "tensors' bytes do not sum to its own"),
    ],
)
def test_claims_that_cannot_be(opened, change, message):
    pieces = opened()
    change(pieces.header)
    refuse(pieces.sealed(), message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": [0, 16]}, r"shape \(0, 16\) is none of a tensor"),
        ({"shape": [-1, -16]}, r"shape \(-1, -16\) is none of a tensor"),
        ({"shape": [2**39, 2**39]}, "claims .* numbers, more than so many bytes can honestly hold"),
        ({"shape": [10**30]}, "is none of a tensor"),
        ({"shape": [1] * 9}, "is none of a tensor"),
        ({"shape": "x"}, "shape: Input should be a valid"),
        ({"groups": 0}, "columns do not divide into 0 groups"),
        ({"groups": 3}, "columns do not divide into 3 groups"),
        ({"groups": 2**40}, "columns do not divide into"),
        ({"name": "model.norm.weight"}, "tensor 'model.norm.weight' stands there twice"),
        ({"name": "evil"}, "tensors model.* missing"),
        ({"name": 5}, "name: Input should be a valid string"),
        ({"dtype": "x"}, "unknown key 'dtype'"),
    ],
)
def test_tensors_that_cannot_be(opened, change, message):
    pieces = opened()
    pieces.section(RANGE)["tensors"][0] |= change
    refuse(pieces.sealed(), message)


def test_sections_of_unknown_forms(opened):
    for field, value, name, message in (
        ("codec", "zstd", "codes/6/zstd", "unknown codec 'zstd'"),
        ("bits", 9, "codes/9/range", "codes have 2 to 8 bits, not 9"),
        ("bits", 3, "codes/3/range", "codes/3/range"),
    ):
        pieces = opened()
        pieces.section(RANGE).update({field: value, "name": name})
        refuse(pieces.sealed(), message)
    for section, codec in (("scales", "zlib"), ("tokenizer", "xz"), ("plain/float16", "range")):
        pieces = opened()
        pieces.section(section)["codec"] = codec
        refuse(pieces.sealed(), f"section '{section}': unknown codec '{codec}'")
    pieces = opened()
    pieces.section("plain/float16").update(dtype="object", name="plain/object")
    refuse(pieces.sealed(), "unknown dtype 'object'; known: float16")


@pytest.mark.parametrize("name", ["../x.json", "/etc/x.json", ".json", "a/b.json", "x.py", "x.json\n", "x" * 99, ""])
def test_files_that_belong_to_no_tokenizer(opened, name):
    pieces = opened()
    pieces.section("tokenizer")["files"][0]["name"] = name
    refuse(pieces.sealed(), "section 'tokenizer': file .* is none of a tokenizer")


def test_lengths_of_files(opened):
    for size, message in ((-1, "of -1 bytes"), (10**10, "cannot honestly hold files of 10,000,")):
        pieces = opened()
        pieces.section("tokenizer")["files"][0]["bytes"] = size
        refuse(pieces.sealed(), message)
    pieces = opened()
    pieces.section("tokenizer")["files"] *= 2
    refuse(pieces.sealed(), "a file stands there twice")


def test_every_file_of_the_header_survives_its_own_reading(opened, packed):
    pieces = opened()
    again = Artifact(pieces.sealed(json.dumps(pieces.header).encode()))
    assert again.header == Artifact(packed).header


def test_a_section_is_called_after_its_content():
    base = {"name": "", "offset": 0, "bytes": 0, "sha256": ""}
    assert kind_of(Section(**base, codec="range", bits=6)) == "codes/6/range"
    assert kind_of(Section(**base, codec="brotli", dtype="int64")) == "plain/int64"
    assert kind_of(Section(**base, codec="brotli")) == "scales"
