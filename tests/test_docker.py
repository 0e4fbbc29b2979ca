"""The container images in docker/, as far as that shows without a container daemon.

The tools that look at the files are in docker/tools.txt (`make docker-tools`); a test whose tool is
not there is skipped. Where there are root, buildah and debootstrap, `docker/verify quick` builds
the runtime image as well; `VERIFY_IMAGE=1` has it build all images, and run in them what
docker/README.md says, which takes a quarter of an hour.
"""

from __future__ import annotations

import faulthandler
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml  # type: ignore[import-untyped]
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import kvgds
from buckets import settings

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from s3 import JuiceServer

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
DASHBOARD = DOCKER / "grafana" / "kvgds.json"
PAGE = 4096
SCRIPTS = ("s3", "verify")
LIBRARIES = ("cuda12.txt", "cuda13.txt")


def pins(path: Path) -> dict[str, str]:
    """Versions by package; a line that holds none, or not exactly one, is an error."""
    lines = (line for line in path.read_text("utf-8").splitlines() if line and line[0] != "#")
    wanted = [Requirement(line) for line in lines]
    found: dict[str, str] = {}
    for requirement in wanted:
        (specifier,) = requirement.specifier
        assert specifier.operator == "==", requirement
        found[canonicalize_name(requirement.name)] = specifier.version
    assert len(found) == len(wanted)
    return found


def tool(name: str, *arguments: str | Path) -> None:
    """Run a tool of docker/tools.txt, which must find nothing; skip where it is not installed."""
    command = Path(sys.executable).with_name(name)
    if not command.exists():
        pytest.skip(f"{name} is not installed: make docker-tools")
    done = subprocess.run(
        [command, *arguments], cwd=DOCKER, capture_output=True, check=False, text=True
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout


def test_hadolint_has_nothing_to_say() -> None:
    tool("hadolint", "Dockerfile")


def test_shellcheck_has_nothing_to_say() -> None:
    tool("shellcheck", *SCRIPTS)


def test_compose_files_are_of_the_schema() -> None:
    files = sorted(path.name for path in DOCKER.glob("compose*.yaml"))
    assert files == ["compose.gpu.yaml", "compose.yaml"]
    tool("check-jsonschema", "--builtin-schema", "vendor.compose-spec", *files)


def test_what_compose_mounts_and_builds_is_there() -> None:
    composed = yaml.safe_load((DOCKER / "compose.yaml").read_text("utf-8"))
    dockerfile = (DOCKER / "Dockerfile").read_text("utf-8")
    stages = set(re.findall(r"^FROM .* AS (\S+)$", dockerfile, re.MULTILINE))
    for service in composed["services"].values():
        if "build" in service:
            assert service["build"]["target"] in stages
            assert (DOCKER / service["build"]["context"]).resolve() == ROOT
        else:
            assert re.search(r":v?\d+\.\d+\.\d+$", service["image"]), "not pinned"
        for volume in service["volumes"]:
            source = volume.partition(":")[0]
            assert source in composed["volumes"] or (DOCKER / source).is_file(), volume


def test_compose_sets_the_engine_up() -> None:
    composed = yaml.safe_load((DOCKER / "compose.yaml").read_text("utf-8"))
    environ = composed["services"]["engine"]["environment"]
    given = {name: re.sub(r"^\${.*}$", "secret", value) for name, value in environ.items()}
    config = kvgds.load_config(None, given)
    directory, bucket = config.tiers
    assert isinstance(directory, kvgds.FileTier)
    assert isinstance(bucket, kvgds.ObjectTier)


def test_no_secret_is_in_a_file() -> None:
    """What is called one is a variable, or refers to one."""
    named = re.compile(r"(?:SECRET|PASSWORD|TOKEN)\w*[\"']?\s*[:=]\s*[\"']?(\S)")
    texts = [path.read_text("utf-8") for path in DOCKER.rglob("*") if path.is_file()]
    given = [first for text in texts for first in named.findall(text)]
    assert len(given) > 4
    assert set(given) <= {"$", "?"}


def test_the_image_is_of_this_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    dockerfile = (DOCKER / "Dockerfile").read_text("utf-8")
    assert re.findall(r'image\.version="(.*?)"', dockerfile) == [project["version"]]
    assert re.findall(r'image\.licenses="(.*?)"', dockerfile) == [project["license"]]


@pytest.mark.parametrize("name", LIBRARIES)
def test_libraries_are_what_the_extra_asks_for(name: str) -> None:
    """All of it, in versions that suit, and nothing that the constraints hold elsewhere."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extra = name.removesuffix(".txt").replace("cuda", "cu")
    wanted = [Requirement(line) for line in project["optional-dependencies"][extra]]
    found = pins(DOCKER / name)
    assert {requirement.name for requirement in wanted} == found.keys() - {"cuda-pathfinder"}
    assert all(requirement.specifier.contains(found[requirement.name]) for requirement in wanted)


def test_every_pin_is_held_once() -> None:
    constraints = pins(ROOT / "constraints.txt")
    nixl = constraints["nixl-cu12"]
    assert pins(DOCKER / "cuda13.txt")["nixl-cu13"] == nixl
    for name in (*LIBRARIES, "tools.txt"):
        assert not constraints.keys() & pins(DOCKER / name).keys(), name


def test_cufile_may_not_fall_back() -> None:
    assert json.loads((DOCKER / "cufile.json").read_text("utf-8"))["properties"] == {
        "allow_compat_mode": False,
        "use_pci_p2pdma": True,
    }


def test_the_health_check_stores_and_loads(tmp_path: Path) -> None:
    dockerfile = (DOCKER / "Dockerfile").read_text("utf-8")
    (check,) = re.findall(r"^HEALTHCHECK .*\\\n +CMD (\[.*\])$", dockerfile, re.MULTILINE)
    command = [part.replace("/kv", str(tmp_path)) for part in json.loads(check)]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environ = os.environ | {"PATH": path}
    done = subprocess.run(command, capture_output=True, check=False, text=True, env=environ)
    assert (done.returncode, done.stderr) == (0, "")
    assert "and back" in done.stdout
    assert list(tmp_path.iterdir()) == []


# --- the dashboard ------------------------------------------------------------------------


def queries() -> Iterator[str]:
    """Every query of the dashboard, with Grafana's variable put in."""
    for panel in json.loads(DASHBOARD.read_text("utf-8"))["panels"]:
        for target in panel["targets"]:
            yield target["expr"].replace("$__rate_interval", "1m")


def selectors(promql: Any, query: str) -> Iterator[tuple[Any, set[str]]]:
    """Each selector of a query, with the labels that are kept of it."""

    def visit(node: Any, kept: frozenset[str]) -> Iterator[tuple[Any, set[str]]]:
        if isinstance(node, promql.VectorSelector):
            yield node, set(kept)
        elif isinstance(node, promql.MatrixSelector):
            yield from visit(node.vector_selector, kept)
        elif isinstance(node, promql.AggregateExpr):
            yield from visit(node.expr, frozenset(node.modifier.labels if node.modifier else ()))
        elif isinstance(node, promql.BinaryExpr):
            yield from visit(node.lhs, kept)
            yield from visit(node.rhs, kept)
        elif isinstance(node, promql.ParenExpr):
            yield from visit(node.expr, kept)
        elif isinstance(node, promql.Call):
            for argument in node.args:
                yield from visit(argument, kept)
        else:
            assert isinstance(node, promql.NumberLiteral), node

    yield from visit(promql.parse(query), frozenset())


def selected(promql: Any, selector: Any, samples: Iterable[Any]) -> list[Any]:
    """The samples that a selector means."""
    return [
        sample
        for sample in samples
        if sample.name == selector.name
        and all(matches(promql, matcher, sample) for matcher in selector.matchers.matchers)
    ]


def matches(promql: Any, matcher: Any, sample: Any) -> bool:
    value, ops = sample.labels.get(matcher.name, ""), promql.MatchOp
    if matcher.op in (ops.Equal, ops.NotEqual):
        return bool((value == matcher.value) == (matcher.op == ops.Equal))
    return bool((re.fullmatch(matcher.value, value) is not None) == (matcher.op == ops.Re))


async def exported(root: Path, s3: JuiceServer) -> list[Any]:
    """What an engine with two tiers exports once it has stored, loaded, missed and evicted."""
    namespace = kvgds.Namespace(model="test")
    directory = kvgds.FileTier(root=root, capacity_bytes=8 * PAGE)
    config = kvgds.EngineConfig(
        namespace=namespace, tiers=(directory, settings(s3, s3.make_bucket()))
    )
    async with kvgds.open_engine(config) as engine:
        memory = bytearray(PAGE)
        for i in range(8):
            assert await engine.store(b"%d" % i, memory)
        assert await engine.load(b"0", memory)
        assert not await engine.load(b"nowhere", memory)
        return [sample for metric in engine.metrics.registry.collect() for sample in metric.samples]


async def test_the_dashboard_asks_for_what_an_engine_exports(
    tmp_path: Path, s3: JuiceServer
) -> None:
    promql: Any = pytest.importorskip("promql_parser", reason="make docker-tools")
    samples = await exported(tmp_path / "blocks", s3)
    asked = set()
    for query in queries():
        for selector, kept in selectors(promql, query):
            found = selected(promql, selector, samples)
            assert found, query
            assert kept <= found[0].labels.keys(), query
            asked.add(selector.name)
    assert {sample.name for sample in samples} - asked == {
        "kvgds_blocks",
        "kvgds_operation_seconds_count",
        "kvgds_operation_seconds_sum",
        "kvgds_promoted_total",
        "kvgds_upload_failures_total",
        "kvgds_uploaded_total",
    }, "of what is new, decide whether the dashboard shows it"


async def test_a_query_that_finds_nothing_is_seen(tmp_path: Path, s3: JuiceServer) -> None:
    promql: Any = pytest.importorskip("promql_parser", reason="make docker-tools")
    samples = await exported(tmp_path / "blocks", s3)
    for wrong in ("kvgds_operation_total", 'kvgds_operations_total{outcome="stroed"}'):
        ((selector, _),) = selectors(promql, wrong)
        assert selected(promql, selector, samples) == []
    with pytest.raises(ValueError, match="unclosed"):
        promql.parse("sum(rate(kvgds_bytes_total[1m])")


def test_the_legend_names_labels_that_are_kept() -> None:
    promql: Any = pytest.importorskip("promql_parser", reason="make docker-tools")
    targets = [
        target
        for panel in json.loads(DASHBOARD.read_text("utf-8"))["panels"]
        for target in panel["targets"]
    ]
    for target in targets:
        named = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
        query = target["expr"].replace("$__rate_interval", "1m")
        if isinstance(promql.parse(query), promql.VectorSelector | promql.BinaryExpr):
            continue  # keeps all labels
        ((_, kept),) = selectors(promql, query)
        assert named == kept - {"le"}, target


# --- the images ---------------------------------------------------------------------------


@pytest.mark.timeout(0)
def test_the_image_is_built_and_works() -> None:
    missing = [name for name in ("buildah", "debootstrap") if not shutil.which(name)]
    if missing or os.geteuid() != 0:
        pytest.skip(f"docker/verify needs root, buildah and debootstrap; missing: {missing}")
    faulthandler.cancel_dump_traceback_later()  # the backstop for tests that hang: five minutes
    what = () if os.environ.get("VERIFY_IMAGE") else ("quick",)
    subprocess.run([DOCKER / "verify", *what], check=True, timeout=3600)
