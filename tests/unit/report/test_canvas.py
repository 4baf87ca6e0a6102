from __future__ import annotations

import sys

import pytest

from ouroboros.errors import OuroborosError
from ouroboros.report.canvas import canvas, label


def test_missing_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(OuroborosError, match=r"matplotlib.*pip install 'ouroboros-lm\[report\]'"), canvas("x"):
        pass


def test_settings_do_not_leak_and_pyplot_stays_out() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    with canvas("x") as drawing:
        drawing.axes.plot([0, 1], [0, 1])
        assert drawing.svg("a line").startswith("<svg")
    assert dict(matplotlib.rcParams) == before


def test_foreign_names_are_text() -> None:
    with canvas("x") as drawing:
        drawing.axes.plot([0, 1], [0, 1], label=label("_$a^$ <b> \x00 \u4e2d"))
        drawing.axes.legend()
        svg = drawing.svg("names")
    assert "$a^$ &lt;b&gt; \ufffd \u4e2d" in svg


def test_label_is_never_hidden() -> None:
    assert label("__x\n y") == "x y"
    assert label("_") == label(" ") == "unnamed"
