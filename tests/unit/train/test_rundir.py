"""What a run keeps, and under which names."""

import signal

import pytest

from ouroboros.errors import OuroborosError
from ouroboros.train.run import start
from ouroboros.train.rundir import RunDirectory


def test_a_directory_before_during_and_after_a_run(make, stop_at, tmp_path):
    run = RunDirectory(tmp_path / "run")
    assert not run.is_run and not run.has_data and run.newest() is None and run.model_directory() is None
    with pytest.raises(
        OuroborosError, match=r"does not exist; start a run with `ouroboros train RECIPE --data SRC --out"
    ):
        run.read_recipe()
    run.path.mkdir()
    with pytest.raises(OuroborosError, match=r"is not a run directory \(no recipe\.json\)"):
        run.read_recipe()
    recipe = make()
    start(recipe, run.path, progress=stop_at(2, signal.SIGTERM))
    newest = run.newest()
    assert newest is not None and newest.step == run.state()["counters"]["step"] == 2
    assert run.is_run and run.has_data and run.read_recipe().name == "small" and not run.weights_file.exists()
    assert run.model_directory() == newest.path == run.checkpoints / "step-00000002"
    assert run.open_data().count("train", "bytes") > 0 and run.metrics_file.is_file() and not run.scores_file.exists()
    for name in ("config.json", "model.safetensors"):
        (run.path / name).touch()
    assert run.model_directory() == run.path
    run.recipe_file.write_bytes(b"\xff\xfe")
    with pytest.raises(OuroborosError, match=r"recipe\.json: not UTF-8 text; the file is damaged"):
        run.read_recipe()
