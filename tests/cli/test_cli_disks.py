"""The commands on a node with several NVMe directories."""

import json
from pathlib import Path

from tests.cli.cli_node import PAGES, Run, running_agent, spill_chain


def test_commands_cover_every_directory(run: Run, environ: dict[str, str], tmp_path: Path) -> None:
    paths = [tmp_path / "disk 1", tmp_path / "disk 2", tmp_path / "disk 3"]
    paths[2].mkdir()
    (paths[2] / "journal").mkdir()  # makes the directory impossible to open
    environ["MEMKV_NVME_DIRECTORY"] = ",".join(map(str, paths))
    set_here = {"MEMKV_NVME_DIRECTORY": ",".join(map(str, paths)), "COLUMNS": "300"}
    with running_agent(environ) as client:
        chain = spill_chain(client)
        report = json.loads(run("stats", "--json", **set_here).out)
        nvme = next(tier for tier in report["engine"]["tiers"] if tier["name"] == "nvme")
        assert [disk[2][0] for disk in nvme["disks"]] == [PAGES // 2, PAGES // 2, 0]
        assert "1 of 3 disks: " in nvme["problem"]
        works = {
            sample["labels"]["directory"]: sample["value"]
            for sample in report["metrics"]
            if sample["name"] == "memkv_disk_works"
        }
        assert works == {str(paths[0]): 1, str(paths[1]): 1, str(paths[2]): 0}
        shown = run("stats", **set_here).out
        assert any(str(paths[0]) in line and "working" in line for line in shown.splitlines())
        assert any(str(paths[2]) in line and "failing" in line for line in shown.splitlines())
        page = run("inspect", chain.namespace.hex(), chain.hashes[0].hex(), "--json", **set_here)
        assert [bool(found) for found in json.loads(page.out)["tiers"].values()].count(True) == 2
    (paths[2] / "journal").rmdir()
    verified = run("verify", **set_here).out
    for path in paths[:2]:
        assert f"nvme: {path}: {PAGES // 2} of {PAGES // 2} pages" in verified
    environ["MEMKV_NVME_DIRECTORY"] = ",".join(map(str, reversed(paths)))
    with running_agent(environ) as client:  # the order of the directories does not matter
        assert client.lookup(chain).length == PAGES


def test_doctor_checks_each_directory_and_reports_a_common_device(run: Run, tmp_path: Path) -> None:
    (tmp_path / "open").mkdir(mode=0o755)
    directories = f"{tmp_path / 'open'}, {tmp_path / 'new'}"
    outcome = run("doctor", "--nvme-directory", directories, COLUMNS="1000")
    assert f"chmod 700 {tmp_path / 'open'}" in outcome.out
    assert f"{tmp_path / 'new'} will be created" in outcome.out
    assert f"{directories} are on the same device" in outcome.out


def test_bench_uses_every_directory_and_cleans_up(run: Run, tmp_path: Path) -> None:
    paths = [tmp_path / "one", tmp_path / "two"]
    for path in paths:
        path.mkdir()
    flags = ("--nvme-directory", ",".join(map(str, paths)), "--minio-endpoint", "")
    outcome = run("bench", *flags, "--page", "64KiB", "--volume", "1MiB", "--json")
    assert outcome.status == 0, outcome.err
    assert [list(path.iterdir()) for path in paths] == [[], []]
