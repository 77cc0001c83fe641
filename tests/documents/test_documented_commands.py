"""Every command in the documentation, checked with the parser of its program but not run."""

import argparse
import importlib.util
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import click
import pytest

from benchmarks.__main__ import main as benchmarks
from memkv_sglang.cli.main import memkv
from memkv_sglang.plugin.flags import add_flags
from tests.documents.pages import ROOT, SHELLS, Command, Span, blocks, commands, spans
from tools.gpu_trial.__main__ import make_parser

OTHER_PROGRAMS = {
    "cat": "POSIX",
    "cd": "changes the directory",
    "chmod": "POSIX",
    "chown": "POSIX",
    "cp": "POSIX",
    "curl": "needs a server",
    "docker": "needs Docker; tests/deploy/test_compose.py reads the Compose file",
    "git": "needs the network",
    "helm": "needs a cluster; test_kubernetes_page.py renders what it would install",
    "install": "coreutils",
    "journalctl": "needs systemd",
    "kubectl": "needs a cluster; test_kubernetes_page.py compares the secrets with the chart",
    "mc": "MinIO's client; test_mc_lines.py runs it",
    "mkdir": "POSIX",
    "openssl": "makes random keys and shows certificates",
    "pip": "installs packages; tests/packaging does that",
    "printf": "POSIX",
    "rm": "POSIX",
    "source": "activates an environment",
    "sysctl": "changes the system",
    "systemctl": "needs systemd; the unit is checked in tests/deploy",
    "tar": "POSIX",
    "tr": "POSIX",
    "umask": "POSIX",
    "useradd": "changes the system",
    "userdel": "changes the system",
    "uv": "installs packages; tests/packaging does that",
}
"""Programs that are not checked here, and why."""

_FILE_NAME = re.compile(r"[\w-]+\.(txt|toml|jsonl?(\.gz)?)")


@cache
def flags_of_servers() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
    add_flags(parser)
    return parser


@cache
def source_of_sglang() -> str:
    spec = importlib.util.find_spec("sglang")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs SGLang")
    srt = Path(spec.submodule_search_locations[0]) / "srt"
    files = [srt / "server_args.py", *(srt / "arg_groups").glob("*.py")]
    return "".join(file.read_text() for file in files)


def check_memkv(words: Sequence[str]) -> None:
    """Parse with the command's own parser. Raises `click.UsageError`."""
    command: click.Command = memkv
    arguments = list(words)
    context = None
    while True:
        context = command.make_context(command.name, arguments, context)
        if not isinstance(command, click.Group):
            return
        _, found, arguments = command.resolve_command(
            context, [*context._protected_args, *context.args]
        )
        assert found is not None
        command = found


def check_server(words: Sequence[str]) -> None:
    """Check that each flag is one of ours or one of SGLang's arguments."""
    _, others = flags_of_servers().parse_known_args(list(words))
    for flag in (word for word in others if word.startswith("--")):
        assert not flag.startswith("--memkv"), f"no flag {flag}"
        assert re.search(rf"\b{flag[2:].replace('-', '_')}\b", source_of_sglang()), f"no {flag}"


def check_router(words: Sequence[str]) -> None:
    router_args = pytest.importorskip("sglang_router.router_args")
    parser = argparse.ArgumentParser(exit_on_error=False)
    router_args.RouterArgs.add_cli_args(parser)
    parser.parse_args(list(words))


def check_benchmark(words: Sequence[str]) -> None:
    benchmarks.make_context("benchmarks", list(words))


MODULES: dict[str, Callable[[Sequence[str]], None]] = {
    "sglang.launch_server": check_server,
    "sglang_router.launch_router": check_router,
    "benchmarks": check_benchmark,
}


def check_python(words: Sequence[str]) -> None:
    if words[0] != "-m":
        assert (ROOT / words[0]).exists()
    elif words[1] in MODULES:
        MODULES[words[1]](words[2:])
    else:
        assert importlib.util.find_spec(words[1])


def check_gpu_trial(words: Sequence[str]) -> None:
    make_parser().parse_args(list(words))


def check_make(words: Sequence[str]) -> None:
    targets = [word for word in words if "=" not in word]
    for target in targets:
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target


PROGRAMS: dict[str, Callable[[Sequence[str]], None]] = {
    "make": check_make,
    "memkv": check_memkv,
    "python": check_python,
    "python3": check_python,
    "run": check_gpu_trial,  # memkv-trial/run, from the archive
}


def check(command: Command) -> None:
    program, arguments = command.words[0], command.words[1:]
    if command.name in PROGRAMS:
        PROGRAMS[command.name](arguments)
    elif (ROOT / program).exists() and "/" in program:
        assert (ROOT / program).stat().st_mode & 0o100, f"{program} cannot be executed"
    else:
        assert command.name in OTHER_PROGRAMS, f"add {command.name} to OTHER_PROGRAMS, with why"


def test_commands_are_accepted_by_their_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    wrong = []
    for command in commands():
        for word in filter(_FILE_NAME.fullmatch, command.words):
            Path(word).touch()  # the parser may require that the file exists
        try:
            check(command)
        except click.exceptions.Exit:  # `--help` and `--version` exit
            pass
        except (click.UsageError, argparse.ArgumentError, AssertionError, SystemExit) as error:
            wrong.append(f"{command.place}: {' '.join(command.words)}: {error}")
    assert not wrong, "\n".join(wrong)
    assert len(commands()) > 40, "the commands were not found"


def test_blocks_with_commands_are_marked_as_shell() -> None:
    """The test of all commands reads only blocks that are marked as shell."""
    starts = (*(f"{name} " for name in PROGRAMS), "pip ", "curl ", "sudo ")
    unmarked = [
        f"{block.place}: {line}"
        for block in blocks()
        if block.language not in SHELLS
        for line in block.text.splitlines()
        if line.startswith(starts)
    ]
    assert not unmarked, "\n".join(unmarked)


def names_of(command: click.Command) -> set[str]:
    return {name for param in command.params for name in (*param.opts, *param.secondary_opts)}


def unknown_part(words: Sequence[str]) -> str:
    """Return the first word that `memkv` does not know; empty if it knows all of them."""
    command: click.Command = memkv
    for word in words:
        if word.startswith("-"):
            flag = word.partition("=")[0]
            if flag not in {*names_of(command), "-h", "--help"}:
                return flag
        elif isinstance(command, click.Group) and word != "...":
            if word not in command.commands:
                return word
            command = command.commands[word]
    return ""


def test_commands_named_in_sentences_exist() -> None:
    named = [span for span in spans() if span.text.startswith("memkv ")]
    unknown = [
        f"{span.place}: {span.text}" for span in named if unknown_part(span.text.split()[1:])
    ]
    assert not unknown, "\n".join(unknown)
    assert len(named) > 100


def test_server_flags_named_in_sentences_exist() -> None:
    known = {name for action in flags_of_servers()._actions for name in action.option_strings}

    def is_known(span: Span) -> bool:
        flag = span.text.split()[0]
        return flag in known or flag.endswith("*")

    named = [span for span in spans() if span.text.startswith("--memkv-")]
    assert not [f"{span.place}: {span.text}" for span in named if not is_known(span)]
    assert named
