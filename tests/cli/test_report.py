"""``report``."""

import shutil

import pytest

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")


def test_a_page_about_a_run(cli, trained, files, tmp_path):
    before = files(trained)
    result = cli("report", trained, "--out", tmp_path / "page.html")
    assert result.status == 0 and str(tmp_path / "page.html") in result.out
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.startswith("<!DOCTYPE html>") or page.lower().startswith("<!doctype html>")
    assert "1 (1)x2 1" in page and "<svg" in page and 'src="http' not in page
    assert files(trained) == before


def test_a_page_about_a_delta_residual(cli, text, tiny, tmp_path):
    options = ["--model.residual", "delta", "--model.residual.values", "2", "--train.telemetry-every", "0", *tiny]
    cli("train", "loop", "--data", text, "--out", tmp_path / "run", "--size", "tiny", "--steps", 2, "--quiet", *options)
    result = cli("report", tmp_path / "run", "--out", tmp_path / "page.html")
    assert result.status == 0, result
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Of 8 residuals, " in result.out and result.out.count("\n") == 2
    assert "Inside the delta residuals" in page and "Of 8 residuals" in page
    assert "left out" not in result.err and page.count("<figure") >= 8


def test_bad_input(cli, trained, text, tmp_path):
    page = tmp_path / "page.html"
    assert "nowhere" in cli("report", tmp_path / "nowhere", "--out", page).error()
    cli("report", tmp_path, "--out", page).error()
    assert "Missing" in cli("report", trained).error(2)
    cli("report", trained, "--out", text / "page.html").error()
    damaged = tmp_path / "damaged"
    shutil.copytree(trained, damaged)
    (damaged / "recipe.json").write_text("{")
    cli("report", damaged, "--out", page).error()
    assert not page.exists()
