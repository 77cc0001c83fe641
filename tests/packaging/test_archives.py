"""What the wheel and the sdist contain."""

import sys
import sysconfig
import tarfile
import zipfile
from email import message_from_string
from email.message import Message
from pathlib import Path, PurePosixPath

from tests.packaging.conftest import Archives
from tests.packaging.environments import ROOT

EXTENSIONS = {path.stem for path in (ROOT / "memkv_sglang").rglob("*.pyx")}


def wheel_files(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def sdist_files(sdist: Path) -> dict[str, bytes]:
    """Return the sdist's files by path, without its top folder."""
    files = {}
    with tarfile.open(sdist) as archive:
        for member in archive.getmembers():
            stream = archive.extractfile(member)
            assert stream is not None, f"{member.name} is not a plain file"
            files[str(PurePosixPath(*PurePosixPath(member.name).parts[1:]))] = stream.read()
    return files


def metadata(files: dict[str, bytes], name: str) -> Message:
    (path,) = (path for path in files if path.endswith(f".dist-info/{name}"))
    return message_from_string(files[path].decode())


def test_wheel_contains_only_what_servers_need(archives: Archives) -> None:
    files = wheel_files(archives.wheel)
    assert {path.partition("/")[0].partition("-")[0] for path in files} == {
        "memkv_sglang",
        "sglang_memkv",
    }
    assert {PurePosixPath(path).name for path in files if "/testing/" in path} == {
        "__init__.py",
        "conformance.py",
        "pages.py",
        "state_machine.py",
    }
    suffixes = {PurePosixPath(path).suffix for path in files if path.startswith("memkv_sglang/")}
    assert suffixes <= {".py", ".pyi", ".typed", ".so", ".patch", ".json", ".md", ".toml"}
    using_test_bed = [path for path, content in files.items() if b"memkv_testbed" in content]
    assert not using_test_bed


def test_wheel_is_complete(archives: Archives) -> None:
    files = wheel_files(archives.wheel)
    for path in (ROOT / "memkv_sglang").rglob("*.py"):
        assert str(path.relative_to(ROOT)) in files
    for path in filter(Path.is_file, (ROOT / "patches").rglob("*")):
        assert f"memkv_sglang/{path.relative_to(ROOT)}" in files
    assert "memkv_sglang/py.typed" in files


def test_wheel_tag_names_interpreter_and_platform(archives: Archives) -> None:
    """A compiled module fits one version of Python and one platform."""
    interpreter = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    tag = f"{interpreter}-{interpreter}-{platform}"
    files = wheel_files(archives.wheel)
    assert archives.wheel.name.endswith(f"-{tag}.whl")
    assert metadata(files, "WHEEL")["Tag"] == tag
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    compiled = {f"memkv_sglang/tiers/minio/http/{name}{suffix}" for name in EXTENSIONS}
    assert {path for path in files if path.endswith(".so")} == compiled


def test_metadata(archives: Archives) -> None:
    described = metadata(wheel_files(archives.wheel), "METADATA")
    assert described["License-Expression"] == "Apache-2.0"
    assert described["Requires-Python"] == "<3.14,>=3.11"
    urls = dict(url.split(", ", 1) for url in described.get_all("Project-URL", []))
    assert set(urls) == {"Homepage", "Documentation", "Changelog", "Issues"}
    assert all(url.startswith("https://github.com/sglang-memkv/") for url in urls.values())
    assert set(described.get_all("Provides-Extra", [])) == {
        "bench",
        "encryption",
        "plan",
        "sglang",
        "testing",
    }
    classifiers = described.get_all("Classifier", [])
    for minor in (11, 12, 13):
        assert f"Programming Language :: Python :: 3.{minor}" in classifiers
    assert described.get_payload() == (ROOT / "README.md").read_text()


def test_sdist_contains_what_the_wheel_is_built_from(archives: Archives) -> None:
    files = sdist_files(archives.sdist)
    assert {path.partition("/")[0] for path in files} == {
        ".gitignore",
        "CHANGELOG.md",
        "LICENSE",
        "PKG-INFO",
        "README.md",
        "hatch_build.py",
        "memkv_sglang",
        "patches",
        "pyproject.toml",
    }
    assert not [path for path in files if path.endswith((".so", ".pyc", ".c"))]
    for name in EXTENSIONS:
        assert f"memkv_sglang/tiers/minio/http/{name}.pyx" in files


def test_every_archive_contains_license_and_readme(
    archives: Archives, platform_archives: Archives
) -> None:
    for built, folder in ((archives, ROOT), (platform_archives, ROOT / "cpu-platform")):
        readme = (folder / "README.md").read_text()
        text = (ROOT / "LICENSE").read_bytes()
        in_sdist, in_wheel = sdist_files(built.sdist), wheel_files(built.wheel)
        assert in_sdist["LICENSE"] == text
        assert in_sdist["README.md"].decode() == readme
        (path,) = (path for path in in_wheel if path.endswith("/licenses/LICENSE"))
        assert in_wheel[path] == text
        assert metadata(in_wheel, "METADATA").get_payload() == readme


def test_cpu_platform_wheel_contains_the_test_bed(platform_archives: Archives) -> None:
    files = wheel_files(platform_archives.wheel)
    assert platform_archives.wheel.name.endswith("-py3-none-any.whl")
    for package in ("sglang_cpu_platform", "memkv_testbed"):
        for path in (ROOT / "cpu-platform" / package).rglob("*.py"):
            assert str(path.relative_to(ROOT / "cpu-platform")) in files
