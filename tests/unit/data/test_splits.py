from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ouroboros.data.records import Document
from ouroboros.data.splits import Splits, check_disjoint, fraction_of, part_of, split_documents
from ouroboros.errors import OuroborosError


def is_cut(splits: Splits) -> bool:
    """Whether a document was cut."""
    return any(span.digest != span.parent for span in (*splits.train, *splits.valid, *splits.test))


def numbered(count: int, size: int = 20) -> list[Document]:
    return [Document(f"{i}", f"{i:0{size}d}\n".encode()) for i in range(count)]


def joined(splits: Splits) -> bytes:
    parts = [splits.documents(split) for split in ("train", "valid", "test")]
    return b"".join(document.data for part in parts for document in part)


def test_fraction_is_the_head_of_sha256() -> None:
    digest = hashlib.sha256(b"abc").digest()
    assert fraction_of(b"abc") == (int.from_bytes(digest[:8], "big") >> 11) / 2**53 == pytest.approx(0xBA7816BF / 2**32)


def test_many_documents_go_by_hash() -> None:
    documents = numbered(2000)
    splits = split_documents(documents, 0.05, 0.1)
    assert not is_cut(splits)
    assert abs(len(splits.valid) - 100) < 40
    assert abs(len(splits.test) - 200) < 60
    assert all(fraction_of(document.data) < 0.05 for document in splits.documents("valid"))
    assert all(0.05 <= fraction_of(document.data) < 0.15 for document in splits.documents("test"))
    assert sorted(d.name for s in ("train", "valid", "test") for d in splits.documents(s)) == sorted(
        d.name for d in documents
    )


def test_copies_land_together() -> None:
    documents = numbered(300)
    copies = [Document(f"copy {document.name}", document.data) for document in documents]
    alone, both = split_documents(documents, 0.05, 0.05), split_documents(documents + copies, 0.05, 0.05)
    assert len(both.valid) == 2 * len(alone.valid) > 0
    assert not {d.data for d in both.documents("valid")} & {d.data for d in both.documents("train")}


def test_one_document_is_cut_at_lines() -> None:
    data = b"".join(b"%06d\r\n" % i for i in range(10_000))
    splits = split_documents([Document("a", data)], 0.05, 0.05)
    assert is_cut(splits)
    assert joined(splits) == data
    assert all(d.data.endswith(b"\r\n") for s in ("train", "valid", "test") for d in splits.documents(s))
    assert len(splits.documents("test")[0].data) == pytest.approx(4_000, abs=10)
    assert splits.documents("valid")[0].name == "a[72000:76000]"


@given(
    st.lists(st.text(min_size=1, max_size=400), min_size=1, max_size=6, unique=True),
    st.sampled_from([(0.05, 0.05), (0.0, 0.1), (0.2, 0.0), (0.4, 0.4)]),
)
def test_cut_loses_nothing_and_keeps_characters_whole(texts: list[str], fractions: tuple[float, float]) -> None:
    documents = [Document(str(i), text.encode()) for i, text in enumerate(texts)]
    try:
        splits = split_documents(documents, *fractions)
    except OuroborosError as error:
        assert "too little text" in str(error) or "both held out" in str(error)
        return
    for split in ("train", "valid", "test"):
        for document in splits.documents(split):
            document.data.decode()
    if is_cut(splits):
        assert joined(splits) == b"".join(document.data for document in documents)
    assert bool(splits.valid) == (fractions[0] > 0)
    assert bool(splits.test) == (fractions[1] > 0)


def test_few_documents_are_cut_without_copies() -> None:
    documents = [Document("a", b"a" * 500 + b"\n"), Document("copy", b"a" * 500 + b"\n"), Document("b", b"b" * 500)]
    splits = split_documents(documents, 0.1, 0.1)
    assert is_cut(splits)
    assert joined(splits) == documents[0].data + documents[2].data


def test_a_huge_held_out_document_does_not_starve_training() -> None:
    documents = numbered(300)
    held_out = next(i for i, document in enumerate(documents) if fraction_of(document.data) < 0.05)
    huge = next(b"%d" % i + b"x" * 100_000 for i in range(1000) if fraction_of(b"%d" % i + b"x" * 100_000) < 0.05)
    documents[held_out] = Document("huge", huge)
    splits = split_documents(documents, 0.05, 0.05)
    assert is_cut(splits)
    assert sum(len(d.data) for d in splits.documents("train")) > 80_000


def test_no_held_out_part_asked_for() -> None:
    splits = split_documents(numbered(3), 0.0, 0.0)
    assert (len(splits.train), splits.valid, splits.test) == (3, (), ())


def test_too_little_text() -> None:
    with pytest.raises(OuroborosError, match="too little text"):
        split_documents([Document("a", b"abc")], 0.05, 0.05)


def test_leaks_between_sources_are_refused() -> None:
    text = Document("a", b"".join(b"line %d\n" % i for i in range(500)))
    cut = split_documents([text], 0.05, 0.05)
    whole = split_documents([text], 0.0, 0.0)
    piece = split_documents([cut.documents("valid")[0]], 0.0, 0.0)
    check_disjoint([cut, cut], ["x", "y"])
    for other in (whole, piece):
        for pair in ([cut, other], [other, cut]):
            with pytest.raises(OuroborosError, match="both held out and in training"):
                check_disjoint(pair)
    with pytest.raises(OuroborosError, match="held out of 'x', training part of 'y'"):
        check_disjoint([cut, whole], ["x", "y"])


def test_check_catches_a_wrong_split() -> None:
    good = split_documents(numbered(300), 0.05, 0.05)
    with pytest.raises(OuroborosError, match="both held out and in training"):
        check_disjoint([Splits((*good.train, good.test[0]), good.valid, good.test)])


def test_differently_cut_copies_of_one_text_are_refused() -> None:
    text = Document("a", b"".join(b"line %d\n" % i for i in range(500)))
    with pytest.raises(OuroborosError, match="both held out"):
        check_disjoint([split_documents([text], 0.05, 0.05), split_documents([text], 0.2, 0.2)])


def grouped(groups: int, rewrites: int = 4) -> list[Document]:
    return [
        Document(f"{g}.{r}", f"rewrite {r} of problem {g} and its answer\n".encode(), group=f"problem {g}".encode())
        for r in range(rewrites)
        for g in range(groups)
    ]


def groups_of(splits: Splits) -> list[set[bytes | None]]:
    return [{document.group for document in splits.documents(split)} for split in ("train", "valid", "test")]


@pytest.mark.parametrize("groups", [3, 5, 30, 400])
def test_a_group_stays_on_one_side(groups: int) -> None:
    splits = split_documents(grouped(groups), 0.05, 0.1)
    train, valid, test = groups_of(splits)
    assert not is_cut(splits)
    assert all((train, valid, test))
    assert not (train & valid or train & test or valid & test)
    assert len(train | valid | test) == groups
    held_out = sum(len(splits.documents(split)) for split in ("valid", "test"))
    assert held_out < 0.25 * 4 * groups or groups < 30


def test_many_groups_go_by_hash_of_the_group() -> None:
    for document in split_documents(grouped(400), 0.05, 0.1).documents("valid"):
        assert document.group is not None
        assert fraction_of(document.group) < 0.05
        assert part_of(document, 0.05, 0.1) == "valid"


def test_two_groups_cannot_give_three_parts() -> None:
    with pytest.raises(OuroborosError, match="too little text: 2 groups"):
        split_documents(grouped(2), 0.05, 0.1)


def test_one_text_in_two_groups_is_kept_once() -> None:
    documents = grouped(400)
    held_out = split_documents(documents, 0.05, 0.1).documents("valid")[0]
    again = Document("again", held_out.data, group=next(d.group for d in documents if part_of(d, 0.05, 0.1) == "train"))
    splits = split_documents([*documents, again], 0.05, 0.1)
    assert "again" not in {document.name for document in splits.documents("train")}
    assert held_out in splits.documents("valid")


def test_part_of_is_what_splits_do() -> None:
    documents = numbered(500)
    splits = split_documents(documents, 0.05, 0.1, allow_cut=False)
    for split in ("train", "valid", "test"):
        assert splits.documents(split) == [d for d in documents if part_of(d, 0.05, 0.1) == split]


def test_streams_are_not_cut() -> None:
    with pytest.raises(OuroborosError, match=r"the 1 documents of 5 bytes .* raise data\.valid_fraction"):
        split_documents([Document("a", b"hello")], 0.05, 0.0, allow_cut=False)
    assert len(split_documents(numbered(5), 0.0, 0.0, allow_cut=False).train) == 5
