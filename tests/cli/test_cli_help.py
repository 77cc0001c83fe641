import os
import subprocess
import sys

import pytest

from memkv_sglang.cli.main import main, memkv
from memkv_sglang.config.settings import all_settings

VERBS = sorted(memkv.commands)


def test_help_lists_the_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for verb in ("agent", "config", "doctor", "stats", "inspect", "verify", "bench"):
        assert f"  {verb} " in shown
    assert "..." not in shown.partition("Commands:")[2]


@pytest.mark.parametrize("verb", VERBS)
def test_help_fits_and_shows_no_secret_flag(
    verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main([verb, "--help"]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert not any(setting.flag in shown for setting in all_settings() if setting.secret)


def test_config_help_describes_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    main(["config", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for setting in all_settings():
        if not setting.secret:
            assert setting.flag in shown
            if setting.default != "":
                assert f"[default: {setting.show(setting.default)}" in shown


def test_no_command_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "Usage: memkv" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["nonsense"], ["stats", "--nonsense"], ["stats", "extra"]])
def test_a_usage_error_is_one_line(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1


def test_help_and_agent_import_nothing_slow() -> None:
    program = (
        "import sys; from memkv_sglang.cli.main import main; main(['agent', '--help']); "
        "print(sorted({'minio', 'rich', 'torch', 'sglang', 'numpy'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shell_completion(shell: str) -> None:
    def complete(instruction: str, **variables: str) -> str:
        program = "import sys; from memkv_sglang.cli.main import main; sys.exit(main())"
        return subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "_MEMKV_COMPLETE": f"{shell}_{instruction}", **variables},
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    assert "_MEMKV_COMPLETE" in complete("source")
    # bash and zsh give the position of the word to complete, fish the word itself.
    position = {"COMP_CWORD": "1"} if shell != "fish" else {"COMP_CWORD": "do"}
    assert "doctor" in complete("complete", COMP_WORDS="memkv do", **position)
    position = {"COMP_CWORD": "3"} if shell != "fish" else {"COMP_CWORD": "al"}
    words = "memkv doctor --nvme-direct-io al"
    assert "always" in complete("complete", COMP_WORDS=words, **position)


def test_version_prints_what_a_bug_report_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    shown = capsys.readouterr().out
    for word in ("memkv 0.", "protocol", "page format", "Python 3.", "minio-py", "Linux"):
        assert word in shown
