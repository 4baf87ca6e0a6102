from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ouroboros.data.folders import directory_files, glob_files, lies_inside, walk
from ouroboros.errors import OuroborosError


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    """Write files of so many bytes below a directory."""

    def write(folder: str, **sizes: int) -> Path:
        for name, size in sizes.items():
            path = tmp_path / folder / name.replace("__", "/").replace("_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x" * size)
        return tmp_path / folder

    return write


def names(root: Path, **options: bool) -> list[str]:
    found = directory_files("source", root, **options)
    assert all(path.is_file() for _, path in found)
    return [name for name, _ in found]


def test_compressed_kinds_are_read(make: Callable[..., Path]) -> None:
    root = make("d", a_txt_gz=1, b_jsonl_zst=1, c_json_gz=1, d_json=1, e_gz=1, f_tar_gz=1, g_parquet=1, h_GZ=1)
    assert names(root) == ["a.txt.gz", "b.jsonl.zst", "c.json.gz", "g.parquet"]


def test_documentation_is_no_data_beside_data_of_another_kind(
    make: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    root = make("d", README_md=500, LICENSE_txt=500, data__a_json_gz=50, dataset_infos_json=9)
    assert names(root) == ["data/a.json.gz"]
    assert "1009 of 1059 bytes: LICENSE.txt, README.md, .json" in caplog.text
    assert "WARNING" not in caplog.text
    assert names(make("text", README_md=500, corpus_txt=9)) == ["corpus.txt"]


def test_notes_are_data_whatever_they_are_called(make: Callable[..., Path]) -> None:
    assert names(make("notes", README_md=5, monday_md=5, sub__readme_md=5)) == [
        "README.md",
        "monday.md",
        "sub/readme.md",
    ]
    assert names(make("alone", README_md=50, logo_png=5)) == ["README.md"]
    assert names(make("like", README_md=5, readmeter_jsonl=5)) == ["readmeter.jsonl"]


def test_most_of_it_skipped_is_a_warning(make: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    root = make("d", a_txt=10, b_zip=30, c_png=5, d_png=27)
    assert names(root, quiet=True) == ["a.txt"] and caplog.text == ""
    names(root)
    assert "skipped documentation and files of other kinds, 62 of 72 bytes: .png, .zip" in caplog.text
    assert caplog.records[0].levelname == "WARNING"


def test_links_are_followed_each_directory_once(make: Callable[..., Path], tmp_path: Path) -> None:
    make("real", one_txt=1, sub__two_txt=1)
    root = make("d", own_txt=1, z__in_txt=1)
    for name, target in (("more", "../real"), ("again", "../real/"), ("a", "z"), ("self", "."), ("z/back", "..")):
        (root / name).symlink_to(target)
    (root / "file.txt").symlink_to("own.txt")
    # "again" sorts first; what is below the source keeps its own name
    assert names(root) == ["again/one.txt", "again/sub/two.txt", "file.txt", "own.txt", "z/in.txt"]
    (tmp_path / "link").symlink_to("d")
    assert names(tmp_path / "link") == names(root)


def test_loops_end(make: Callable[..., Path]) -> None:
    root = make("d", own_txt=1, sub__in_txt=1)
    make("other", deep__there_txt=1)
    for name, target in (
        ("up", ".."),
        ("sub/top", "/"),
        ("x", "../other"),
        ("../other/deep/back", "../../d"),
        ("../other/y", "."),
    ):
        (root / name).symlink_to(target)
    assert names(root) == ["own.txt", "sub/in.txt", "x/deep/there.txt"]
    assert len(list(walk(root))) == 4
    assert [name for name, _ in glob_files("s*/**", root)] == ["sub/in.txt"]


def test_what_would_wait_is_skipped(make: Callable[..., Path]) -> None:
    root = make("d", a_txt=1)
    os.mkfifo(root / "waiting.txt")
    assert names(root) == ["a.txt"]
    assert [name for name, _ in glob_files("*.txt", root)] == ["a.txt"]
    os.unlink(root / "a.txt")
    with pytest.raises(OuroborosError, match="no text, code or record files"):
        names(root)
    with pytest.raises(OuroborosError, match="no file matches"):
        glob_files("*.txt", root)


@pytest.mark.parametrize("target", ["gone.txt", "link.txt"])
def test_links_to_nothing(make: Callable[..., Path], target: str) -> None:
    root = make("d", a_txt=1)
    (root / "link.txt").symlink_to(target)
    for call in (lambda: names(root), lambda: glob_files("*", root), lambda: glob_files("**/*", root)):
        with pytest.raises(OuroborosError, match=r"source .*: cannot be read: .*link.txt$"):
            call()
    (root / "link.txt").rename(root / "link.png")
    assert names(root) == ["a.txt"]


def test_globs_go_into_links_once(make: Callable[..., Path]) -> None:
    make("real", one_txt=1)
    root = make("d[1]", own_txt=1, sub__deep__in_txt=1, sub__p_py=1)
    (root / "more").symlink_to("../real")
    for name in ("a", "b", "sub/c"):
        (root / name).symlink_to(root)
    found = {
        pattern: [name for name, _ in glob_files(pattern, root)]
        for pattern in ("**/*.txt", "**", "sub/**/*", "s*/**/deep/*", "**/deep/**/*.txt", "*", "sub/*.py")
    }
    assert found == {
        "**/*.txt": ["more/one.txt", "own.txt", "sub/deep/in.txt"],
        "**": ["more/one.txt", "own.txt", "sub/deep/in.txt", "sub/p.py"],
        "sub/**/*": ["deep/in.txt", "p.py"],
        "s*/**/deep/*": ["sub/deep/in.txt"],
        "**/deep/**/*.txt": ["sub/deep/in.txt"],
        "*": ["own.txt"],
        "sub/*.py": ["p.py"],
    }


def test_lies_inside(make: Callable[..., Path], tmp_path: Path) -> None:
    make("real", one_txt=1)
    root = make("d", own_txt=1)
    (root / "more").symlink_to("../real")
    assert lies_inside(root / "new" / "run", root) and lies_inside(root, root)
    assert lies_inside(tmp_path / "real" / "run", root)
    assert not lies_inside(tmp_path / "dx" / "run", root)


def test_unreadable_directory(make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    root = make("d", a_txt=1)

    def refuse(path: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    for call in (lambda: names(root), lambda: glob_files("**/*", root)):
        with pytest.raises(OuroborosError, match=r"source '.*': cannot be read: Permission denied: .*d$"):
            call()


def test_a_hub_layout(make: Callable[..., Path]) -> None:
    root = make("hub", README_md=900)
    for shard in range(2):
        (root / f"c4-train.0000{shard}-of-01024.json.gz").write_bytes(gzip.compress(b'{"text": "x"}\n'))
    assert names(root) == ["c4-train.00000-of-01024.json.gz", "c4-train.00001-of-01024.json.gz"]
