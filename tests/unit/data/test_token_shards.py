"""Token shards: the format, what is refused, and the ids that training gets of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ouroboros.config import DataSpec
from ouroboros.data.documents import judged_documents
from ouroboros.data.loader import WindowLoader
from ouroboros.data.prepared import PreparedData
from ouroboros.data.records import Document
from ouroboros.data.shards import prepare
from ouroboros.data.sources import parse_source, source_files
from ouroboros.data.stream import open_loader
from ouroboros.data.token_shards import (
    HEADER_BYTES,
    encode_documents,
    read_shard,
    read_shards,
    read_stream,
    shard_files,
    shard_tokenizer,
    write_shards,
)
from ouroboros.data.tokenize import TextTokenizer, byte_tokenizer, load_tokenizer, train_bpe
from ouroboros.errors import OuroborosError

TEXTS = [f"Document {n} says that {n} times {n} is {n * n}. ".encode() * (1 + n % 3) for n in range(40)]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    train_bpe(TEXTS, 300).save(path)
    return path


def stream_of(tokenizer: TextTokenizer) -> np.ndarray:
    return np.concatenate([np.append(tokenizer.eos_id, ids) for ids in tokenizer.encode_many(TEXTS)])


@pytest.fixture
def shards(bpe: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    folder.mkdir()
    write_shards(folder, "train", [stream_of(load_tokenizer(bpe))], shard_tokens=200)
    return folder


def test_what_is_written_is_read(tmp_path: Path) -> None:
    ids = np.arange(65_536)[::-1]
    written = write_shards(tmp_path, "x", [ids[:5], ids[5:40_000], ids[:0], ids[40_000:]], shard_tokens=30_000)
    assert [path.name for path in written] == ["x_000000.bin", "x_000001.bin", "x_000002.bin"]
    assert [path.stat().st_size for path in written] == [1024 + 60_000, 1024 + 60_000, 1024 + 2 * 5536]
    assert np.array_equal(np.concatenate([read_shard(path) for path in written]), ids)
    head = np.frombuffer(written[2].read_bytes()[:1024], "<i4")
    assert head[:3].tolist() == [20240520, 1, 5536] and not head[3:].any()
    assert write_shards(tmp_path, "none", []) == []
    with pytest.raises(OuroborosError, match="id 65536 does not fit"):
        write_shards(tmp_path, "y", [np.array([65_536])])
    with pytest.raises(OuroborosError, match="at least one id"):
        write_shards(tmp_path, "y", [ids], shard_tokens=0)


def words(*values: int, ids: int = 3) -> bytes:
    head = np.zeros(256, "<i4")
    head[: len(values)] = values
    return head.tobytes() + bytes(2 * ids)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "has 0 bytes, its header alone needs 1024"),
        (words(20240520, 1, 3)[:1000], "has 1000 bytes, its header alone needs 1024"),
        (words(20240801, 1, 3), "begins with 20240801 instead of 20240520, so it is no token shard"),
        (words(20240520, 2, 3), "has version 2, only 1 is known"),
        (words(20240520, 1, 4), "its header says 4 ids, so 1032 bytes, but it has 1030: it was cut or altered"),
        (words(20240520, 1, 2), "says 2 ids, so 1028 bytes, but it has 1030"),
        (words(20240520, 1, 3)[:-1], "so 1030 bytes, but it has 1029"),
        (words(20240520, 1, -1), "says -1 ids"),
    ],
)
def test_malformed_shards_are_refused(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.bin"
    path.write_bytes(data)
    with pytest.raises(OuroborosError, match=message) as caught:
        read_shard(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(OuroborosError, match=message):
        prepare(DataSpec(sources=(f"shards:{path}",)), tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_places(shards: Path) -> None:
    names = sorted(path.name for path in shards.iterdir())
    assert len(names) > 3 and names == [name for name, _ in shard_files("shards", shards.parent)]
    assert [name for name, _ in shard_files(f"{shards}/*_00000[12].bin", None)] == names[1:3]
    assert shard_files(names[0], shards) == [(names[0], shards / names[0])]
    ref = parse_source(f"shards:{shards}=2")
    assert (ref.kind, ref.weight, len(source_files(ref)), ref.is_filtered) == ("shards", 2, len(names), False)
    assert ref.is_there() and parse_source(f"shards:{shards}/*.bin").is_there()
    assert not parse_source("shards:nowhere").is_there()
    for text, message in (
        ("nowhere", "no such file"),
        (str(shards.parent), "no .bin file"),
        ("no*", "no file matches"),
    ):
        with pytest.raises(OuroborosError, match=message):
            shard_files(text, None)


def test_documents_go_on_from_shard_to_shard(shards: Path, bpe: Path) -> None:
    tokenizer = load_tokenizer(bpe)
    found = [read() for read in read_shards(shard_files(str(shards), None), tokenizer)]
    assert [document.data for document in found] == TEXTS
    assert found[0].name == "train_000000.bin:1" and len({document.name for document in found}) == len(TEXTS)
    for document, ids in zip(found, tokenizer.encode_many(TEXTS), strict=True):
        assert document.ids is not None and document.ids.tolist() == ids.tolist()
        assert document.part(0, 5).ids is None
    later = judged_documents(parse_source(f"shards:{shards}"), DataSpec(tokenizer=str(bpe)), start=37)
    assert [document.data for document in later] == TEXTS[37:]


def test_ids_beyond_the_vocabulary_are_refused(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(OuroborosError, match=r"000000.bin': has id 299 \(number 0 of its ids\), but the"):
        list(read_stream(shard_files(str(shards), None), 299))
    with pytest.raises(OuroborosError, match="but the tokenizer 257 ids; name the one that it was made with"):
        prepare(DataSpec(sources=(f"shards:{shards}",)), tmp_path / "data")
    for name in ("chars", "bpe:300"):
        with pytest.raises(OuroborosError, match="were made with a tokenizer already; name its directory"):
            shard_tokenizer(name)


def test_ids_that_a_document_has_are_not_made_anew() -> None:
    documents = [Document("a", b"ab", ids=np.array([1, 2], "<u2")), Document("b", b"cd")]
    found = list(encode_documents(byte_tokenizer(), documents, [b"ab", b"cd"], ["a", "b"]))
    assert [ids.tolist() for ids in found] == [[1, 2], [99, 100]] and found[0].dtype == np.int32


def prepared_of(shards: Path, bpe: Path, out: Path, **options: object) -> PreparedData:
    spec = DataSpec(sources=(f"shards:{shards}",), tokenizer=str(bpe), sequence_length=8, **options)  # pyrefly: ignore
    return prepare(spec, out)


def test_training_gets_the_ids_of_the_shards(shards: Path, bpe: Path, tmp_path: Path) -> None:
    """Also where the tokenizer would cut the text otherwise: here every document is written byte by byte."""
    tokenizer = load_tokenizer(bpe)
    single = {tokenizer.decode([index]): index for index in range(tokenizer.vocab_size)}
    spelt = [np.array([single[bytes([byte])] for byte in text]) for text in TEXTS]
    write_shards(shards, "train", [np.append(tokenizer.eos_id, ids) for ids in spelt], shard_tokens=10_000)
    for path in sorted(shards.iterdir())[1:]:
        path.unlink()
    data = prepared_of(shards, bpe, tmp_path / "data")
    train = [text for text in TEXTS if text in set(data.documents("train"))]
    assert len(train) > 30 and data.count("valid", "documents") >= 1
    expected = [np.append(tokenizer.eos_id, spelt[TEXTS.index(text)]) for text in train]
    assert np.array_equal(data.tokens("train", 0), np.concatenate(expected))
    again = prepared_of(shards, bpe, tmp_path / "data")
    assert again.fingerprint == data.fingerprint
    stream = open_loader(
        prepared_of(shards, bpe, tmp_path / "head", stream=True), batch_size=2, sequence_length=8, seed=0
    )
    assert np.array_equal(stream.next_batch()[0], np.concatenate(expected)[:9])


def test_batches_are_the_same_at_any_world_size_and_after_a_resume(shards: Path, bpe: Path, tmp_path: Path) -> None:
    data = prepared_of(shards, bpe, tmp_path / "data")
    options = {"batch_size": 4, "sequence_length": 8, "seed": 1}
    one = WindowLoader(data, **options)
    two = [WindowLoader(data, **options, rank=rank, world_size=2) for rank in (0, 1)]
    for _ in range(5):
        assert np.array_equal(one.next_batch(), np.concatenate([loader.next_batch() for loader in two]))
    other = WindowLoader(data, **options, rank=1, world_size=4)
    other.load_state_dict(one.state_dict())
    assert np.array_equal(other.next_batch(), one.next_batch()[1:2])


def test_a_changed_shard_is_refused_on_resume(shards: Path, bpe: Path, tmp_path: Path) -> None:
    data = prepared_of(shards, bpe, tmp_path / "data")
    path = shards / "train_000001.bin"
    content = bytearray(path.read_bytes())
    content[HEADER_BYTES + 8] ^= 1
    path.write_bytes(content)
    with pytest.raises(OuroborosError, match="has changed since"):
        data.find_sources()
    for shard in shards.iterdir():
        shard.unlink()
    shards.rmdir()
    data.find_sources()  # gone: the run goes on with its own copy
