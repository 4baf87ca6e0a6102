"""A packed file that is cut, altered or hostile ends in one line; bombs do, in little time and memory."""

from __future__ import annotations

import dataclasses
import json
import lzma
import subprocess
import sys
import textwrap
import zlib
from pathlib import Path

import brotli
import numpy as np
import pytest

from ouroboros.errors import OuroborosError
from ouroboros.pack.artifact import MAGIC, PREFIX, Artifact, expected_tensors
from ouroboros.pack.codec import planes, squeeze
from ouroboros.pack.write import assembled

OLD = Path(__file__).resolve().parents[2] / "fixtures" / "packed-version-1.ouro"


def message(data: bytes) -> str:
    """The one line that refuses a file."""
    with pytest.raises(OuroborosError) as caught:
        Artifact(data, "model.ouro").tensors()
    assert "model.ouro" in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def test_every_truncation_is_refused(packed):
    begin = PREFIX.size + PREFIX.unpack(packed[: PREFIX.size])[2]
    for length in [*range(begin + 20), *range(begin + 20, len(packed), 7), len(packed) - 1]:
        with pytest.raises(OuroborosError, match="which this is not|cut off|more than a header|sections have"):
            Artifact(packed[:length])
    for more in (b"\0", packed):
        assert "the sections have" in message(packed + more)


def test_every_flipped_byte_is_refused(packed):
    begin = PREFIX.size + PREFIX.unpack(packed[: PREFIX.size])[2]
    for place in [*range(begin), *range(begin, len(packed), 11), len(packed) - 1]:
        bad = bytearray(packed)
        bad[place] ^= 1 << place % 8
        with pytest.raises(OuroborosError, match="which this is not|version|more than a header|sha256 differs"):
            Artifact(bytes(bad))


def test_other_versions_and_other_files_are_refused(packed, tmp_path):
    later = MAGIC + (2).to_bytes(4, "little") + packed[12:]
    assert "version 2 of the format; this library reads 1" in message(later)
    for text in (b"", b"{}", b"PK\x03\x04" * 20, zlib.compress(bytes(1000)), lzma.compress(bytes(1000))):
        assert "is a file; give a run directory" in message(text)
    with pytest.raises(OuroborosError, match="none.ouro: cannot read: No such file"):
        Artifact(tmp_path / "none.ouro")


def test_content_of_sections_is_checked(opened):
    def changed(name: str, content: bytes) -> str:
        pieces = opened()
        pieces.replace(name, content)
        return message(pieces.sealed())

    pieces = opened()
    scales = np.frombuffer(brotli.decompress(pieces.content[pieces.number("scales")]), dtype=np.uint8)
    values = scales.reshape(2, -1).T.copy().view(np.float16).reshape(-1)
    for bad in (np.nan, np.inf, -np.inf):
        values[3] = bad
        assert "section 'scales': holds NaN or infinity" in changed("scales", squeeze([planes(values)])[0])
    assert "section 'scales': holds" in changed("scales", squeeze([planes(values[1:])])[0])
    assert "section 'plain/float16': ends within tensor" in changed("plain/float16", squeeze([b"abc"])[0])
    assert "section 'codes/6/range': more data than codes" in changed("codes/6/range", bytes(40_000))
    assert "section 'codes/6/range': the compressed stream is cut off" in changed("codes/6/range", bytes(7))
    assert "section 'scales': not one stream of brotli" in changed("scales", zlib.compress(bytes(100)))
    with pytest.raises(OuroborosError, match="section 'tokenizer': holds 2 bytes"):
        pieces.replace("tokenizer", squeeze([b"{}"])[0])
        Artifact(pieces.sealed()).tokenizer_files()


def test_codes_need_their_steps(opened):
    pieces = opened()
    number = pieces.number("scales")
    pieces.replace("scales", b"")
    del pieces.header["sections"][number], pieces.content[number]
    assert "section 'scales' is missing" in message(pieces.sealed())


BOMBS = """
    import lzma, resource, sys, time, zlib
    from pathlib import Path
    import brotli
    from ouroboros.errors import OuroborosError
    from ouroboros.pack.artifact import Artifact

    Artifact(Path(sys.argv[1])).weights()  # everything is imported
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for path in sys.argv[2:]:
        begun = time.process_time()
        try:
            opened = Artifact(Path(path))
            opened.tokenizer_files()
            opened.weights()
        except OuroborosError as error:
            text = str(error)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1000
        print(f"{Path(path).name}|{time.process_time() - begun:.2f}|{grown:.0f}|{text}")
"""


def zeros(size: int) -> bytes:
    """So many million zeros by brotli: pieces of the same bytes, each of which expands to a million."""
    compressor = brotli.Compressor(quality=5, lgwin=24)
    first, *more = (compressor.process(bytes(1_000_000)) + compressor.flush() for _ in range(3))
    assert more[0] == more[1]
    return first + more[0] * (size - 1) + compressor.finish()


def test_bombs_take_little_time_and_memory(opened, packed, tmp_path):
    """10 GB in as few bytes as each format allows, in every section and as the header."""
    bomb = zeros(10_000)
    assert len(bomb) < 200_000
    # zstd: blocks that repeat a zero 131,072 times, of which the last one says so.
    block, last = ((kind | 131_072 << 3).to_bytes(3, "little") + b"\0" for kind in (2, 3))
    zstd = b"\x28\xb5\x2f\xfd\xe0" + (131_072 * 80_000).to_bytes(8, "little") + block * 79_999 + last
    others = {"zlib": zlib.compress(bytes(10**7)), "xz": lzma.compress(bytes(10**7), preset=0), "zstd": zstd}
    files = {"good": packed, "header": assembled(bomb, b"")}
    for name in ("codes/6/range", "codes/4/range", "scales", "plain/bfloat16", "tokenizer"):
        pieces = opened()
        pieces.replace(name, bomb)
        files[name.replace("/", "-")] = pieces.sealed()
    for name, content in others.items():
        pieces = opened()
        pieces.replace("scales", content)
        files[name] = pieces.sealed()
        files[f"{name}-file"] = content
    for codec in ("brotli", "brotli-columns"):  # 10 GB of codes, which the header admits
        pieces, name = opened(), f"codes/6/{codec}"
        pieces.section("codes/6/range").update(codec=codec, name=name)
        pieces.section(name)["tensors"][0]["shape"] = [10**5, 10**5]
        pieces.replace(name, bomb)
        files[f"declared-{codec}"] = pieces.sealed()
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    names = [str(tmp_path / name) for name in files]
    command = [sys.executable, "-c", textwrap.dedent(BOMBS), *names[:1], *names[1:]]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rows = [line.split("|") for line in result.stdout.splitlines()]
    assert [row[0] for row in rows] == list(files)[1:]
    for name, seconds, grown, text in rows:
        assert float(seconds) < 2 and float(grown) < 200, (name, seconds, grown, text)


def test_the_tokenizer_comes_back(packed, tmp_path):
    from ouroboros.data.tokenize import byte_tokenizer, load_tokenizer

    for name, content in Artifact(packed).tokenizer_files().items():
        (tmp_path / name).write_bytes(content)
    assert load_tokenizer(tmp_path).fingerprint == byte_tokenizer().fingerprint


def test_expected_tensors_are_those_of_the_model_without_tied_ones(small):
    names = expected_tensors(small.spec)
    assert "lm_head.weight" not in names and names["model.embed_tokens.weight"].shape == (257, 16)
    assert all(tensor.is_meta for tensor in names.values())
    assert "lm_head.weight" in expected_tensors(dataclasses.replace(small.spec, tie_embeddings=False))


def test_a_file_of_version_1_is_read_as_it_was_written():
    """The file was written when the version was made; what it holds was recorded beside it."""
    artifact = Artifact(OLD)
    sums = {name: round(float(value.double().abs().sum()), 6) for name, value in artifact.weights().items()}
    assert sums == json.loads(OLD.with_suffix(".json").read_text())
    assert artifact.header.facts.score is not None
