"""Studies that come with the library are studies."""

import pytest

from ouroboros.ablate.studies import STUDIES


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_stands(name):
    study = STUDIES[name]()
    assert study.name == name and study.question.endswith("?") and len(study.seeds) >= 2
