"""Run the demo from start to end."""

import signal
import time
from pathlib import Path

from rich.console import Console
from sglang_cpu_platform.client import RequestFailedError
from sglang_cpu_platform.process import ProcessFailedError

from memkv_sglang.config.errors import ConfigError
from memkv_testbed.demo.cluster import Cluster
from memkv_testbed.demo.figures import Figures, compute_figures, failed, samples
from memkv_testbed.demo.needs import DemoError
from memkv_testbed.demo.picture import draw
from memkv_testbed.demo.prompts import Script, load_tokenizer
from memkv_testbed.demo.report import (
    describe_setup,
    one_line,
    print_claims,
    print_legend,
    write_json,
)
from memkv_testbed.demo.scenario import Scenario
from memkv_testbed.demo.screen import Screen
from memkv_testbed.minio_server import MinioServer
from memkv_testbed.other_servers import SeaweedServer, VersityServer
from memkv_testbed.s3_server import S3ServerError
from memkv_testbed.server_binaries import ServerNotFoundError

SERVERS = {"minio": MinioServer, "seaweedfs": SeaweedServer, "versitygw": VersityServer}
"""S3 servers by the value of `--s3`."""

FAULTS = (
    DemoError,
    ConfigError,
    ServerNotFoundError,
    S3ServerError,
    ProcessFailedError,
    RequestFailedError,
    OSError,
)
"""Errors whose message says what is wrong. All others are bugs, and keep their traceback."""


def run(
    console: Console,
    json_path: Path | None,
    picture: Path,
    context_tokens: int,
    s3: str,
    keep: bool,
) -> int:
    """Run the demo; return the exit status. Leaves nothing behind. Raises one of `FAULTS`."""
    began = time.monotonic()
    screen = Screen(console)
    with Cluster(screen.set_status, context_tokens, SERVERS[s3]) as cluster:
        with screen:
            cluster.start()
            script = Script(load_tokenizer(cluster.model), context_tokens)
            scenario = Scenario(cluster, script, screen.set_status, screen.show)
            requests = scenario.run()
            if not keep:
                cluster.close()
        setup = describe_setup(scenario.page_size)
        figures = compute_figures(requests, scenario.page_size, script.changed_position)
        draw(
            samples(requests, scenario.page_size),
            f"{figures['prompt_tokens']:,}-token prompt; {one_line(setup)}",
            picture,
        )
        if json_path is not None:
            write_json(json_path, figures, requests, setup, time.monotonic() - began)
        _conclude(console, figures, one_line(setup), picture, json_path)
        if keep:
            _wait_for_signal(console, cluster)
    return 1 if failed(figures) else 0


def _conclude(
    console: Console, figures: Figures, setup: str, picture: Path, json_path: Path | None
) -> None:
    print_legend(console)
    console.print(setup, style="dim", highlight=False)
    console.print()
    print_claims(console, figures)
    console.print()
    for what, path in (("picture", picture), ("figures", json_path)):
        if path is not None:
            console.print(f"{what}: {path.absolute()}", highlight=False, soft_wrap=True)


def _wait_for_signal(console: Console, cluster: Cluster) -> None:
    """Keep everything running until Ctrl-C or SIGTERM."""
    console.print()
    for name, url in cluster.urls().items():
        console.print(f"{name:>8}  {url}", highlight=False)
    console.print("Ctrl-C (or SIGTERM to this process) stops everything and removes its files.")
    try:
        while True:
            signal.pause()
    except KeyboardInterrupt:
        console.print("stopping")
