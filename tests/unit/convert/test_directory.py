"""A directory appears whole or not at all."""

import pytest

from ouroboros.convert.directory import new_directory
from ouroboros.errors import OuroborosError


@pytest.mark.parametrize("exists", [False, True])
def test_a_new_or_empty_directory_gets_the_content(exists, tmp_path):
    out = tmp_path / "deep" / "model"
    if exists:
        out.mkdir(parents=True)
    with new_directory(out) as work:
        (work / "sub").mkdir()
        (work / "sub" / "file").write_text("content")
        (work / "private").write_text("")
        (work / "private").chmod(0o600)
        assert not out.exists() or not any(out.iterdir())
    assert (out / "sub" / "file").read_text() == "content"
    assert (out / "private").stat().st_mode == (out / "sub" / "file").stat().st_mode
    assert [path.name for path in out.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_leaves_nothing(error, tmp_path):
    with pytest.raises(error), new_directory(tmp_path / "model") as work:
        (work / "file").write_text("half")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_kept(tmp_path):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path, tmp_path / "file"):
        with pytest.raises(OuroborosError, match="exists and is not an empty directory"), new_directory(out):
            pytest.fail("the body ran")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(OuroborosError, match=r"cannot write .*: Not a directory"),
        new_directory(tmp_path / "file" / "m"),
    ):
        pytest.fail("the body ran")
    with pytest.raises(OuroborosError, match="cannot write .*: No space left"), new_directory(tmp_path / "model"):
        raise OSError(28, "No space left on device")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
