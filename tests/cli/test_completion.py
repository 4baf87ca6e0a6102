"""Shell completion: the script as a shell uses it."""

import shutil
import subprocess
import sys

import pytest

from ouroboros.cli import VERBS
from ouroboros.verbs.options import describe

ASK = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
_ouroboros_or_files
echo "${#COMPREPLY[@]}" "${COMPREPLY[@]}"
"""
"""What bash does when the user presses the tabulator key behind the last word."""


@pytest.fixture(scope="module")
def script(command, tmp_path_factory):
    """The script for bash, written by the real command, which must not load torch for it."""
    program = "import sys; from ouroboros.cli import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    made = subprocess.run(
        [sys.executable, "-c", program, "completion", "bash"], check=True, capture_output=True, text=True, timeout=100
    )
    path = tmp_path_factory.mktemp("completion") / "ouroboros.bash"
    path.write_text(made.stdout)
    return path


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ([""], set(VERBS)),
        (["comp"], {"compare", "completion"}),
        (["train", "--model.layo"], {"--model.layout"}),
        (["train", "loop", "--model.loop.gate.b"], {"--model.loop.gate.bias"}),
        (["resume", "run", "--allow"], {"--allow-changes"}),
        (["compare", "loop", "--match", "fl"], {"flops"}),
    ],
)
def test_bash_completes(words, wanted, script):
    asked = subprocess.run(
        ["bash", "-c", ASK, "bash", str(script), "ouroboros", *words], check=True, capture_output=True, text=True
    )
    assert wanted <= set(asked.stdout.split()), asked


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_is_left_to_complete_names_of_models(script):
    """No reply of ours is what lets it."""
    ask = ["bash", "-c", ASK + "complete -p ouroboros", "bash", str(script), "ouroboros", "eval", "ru"]
    asked = subprocess.run(ask, check=True, capture_output=True, text=True)
    assert asked.stdout == "0\ncomplete -o default -F _ouroboros_or_files ouroboros\n"


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_other_shells_get_tyros_script(shell, cli, monkeypatch):
    monkeypatch.setattr("ouroboros.cli.VERBS", {name: VERBS[name] for name in ("inspect", "completion")})
    script = cli("completion", shell)
    assert script.status == 0 and "'inspect'" in script.out and "_ouroboros_or_files" not in script.out


def test_an_unknown_shell_is_refused(cli):
    assert "'bash', 'zsh', 'fish'" in cli("completion", "csh").error(2)


def test_a_verb_that_does_not_parse_is_a_defect():
    with pytest.raises(TypeError, match="does not parse"):
        describe(lambda arguments: 0)
