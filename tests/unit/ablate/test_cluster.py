"""Cells as tasks of a cluster of two workers on this machine, where Ray is installed."""

import builtins

import pytest

from ouroboros.ablate.cluster import run_on_cluster
from ouroboros.ablate.runner import run_study
from ouroboros.errors import OuroborosError

pytestmark = pytest.mark.usefixtures("alive")


@pytest.mark.timeout(400)  # Ray takes long to start on a busy machine
def test_a_local_cluster_gives_what_one_process_gives(study_of, tmp_path):
    pytest.importorskip("ray")
    study = study_of(seeds=(1,))
    found = run_study(study, tmp_path / "cluster", workers=2, cluster="local")
    assert [r.score for r in found] == [r.score for r in run_study(study, tmp_path / "here")]


def test_without_ray_the_extra_is_named(monkeypatch):
    original = builtins.__import__

    def without(name, *rest):
        if name == "ray":
            raise ImportError(name)
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(OuroborosError, match=r"--cluster needs Ray; install ouroboros-lm\[cluster\]"):
        run_on_cluster([], "local", 1, print)
