"""The shape of the package: the imports that a module may have, and the public names."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import flask_gsession

PACKAGE = Path(flask_gsession.__file__).parent

# A file may import only from rows above its own. `stores` is stores/__init__.py.
ROWS = [
    ["signals", "users.roster"],
    ["errors", "events", "watching.redaction"],
    ["processes", "weak"],
    ["tokens", "stores.rights", "stores.file_locks", "stores.interrupts"],
    ["stores.base", "stores.urls"],
    ["stores.exposure", "live.listener", "live"],
    ["values", "stores.wrappers", "flask_session_settings"],
    ["config"],
    ["repository.races", "users.format", "users.labels"],
    ["users.rosters", "users.joins"],
    ["request.state", "request.site_data", "request.durations"],
    ["request.tracking"],
    ["request.rebasing"],
    ["repository"],
    ["journal"],
    [
        "users.revoking",
        "users.rebuilding",
        "watching.tracing",
        "request.unreferenced",
        "request.waiting",
    ],
    ["reconciling"],
    ["request.lifecycle"],
    [
        *("request.checks", "request.blocks", "request.late_changes", "request.debugging"),
        "request.following",
    ],
    ["request.loading"],
    ["request.ending", "request.own_session"],
    ["request.admission", "request.user_values"],
    ["request.ownership"],
    ["request.roster_entries", "request.confirming", "request.joining"],
    ["request.storing"],
    ["request.writing"],
    ["request.saving", "request.lease_renewal"],
    ["request.rewriting"],
    ["request.large", "request.transactions", "request.locking"],
    ["request.session"],
    ["request.decorators", "request.template", "request"],
    ["protocol"],
    [
        *("stores.memory", "stores.sqlite", "stores.redis", "stores.mongodb", "stores.files"),
        "stores.remote",
    ],
    ["stores.edge"],
    ["stores", "typed"],
    ["live"],
    ["moving"],
    ["watching"],
    ["remember"],
    ["authentication", "opening", "streams"],
    ["freshness", "error_pages"],
    ["token_transport"],
    ["interface"],
    ["users"],
    ["extension"],
    ["operate", "sharing"],
    ["health"],
    ["pages", "contrib"],
    ["cli"],
    ["testing"],
]
CONTRACT = [
    "stores.base",
    "stores.parts",
    "stores.journals",
    "stores.foreign",
    "stores.lease",
    "stores.support",
]
RANK = {module: rank for rank, row in enumerate(ROWS) for module in row}

# The packages of an extra may be imported in one place only.
PLACES = {
    "grpc": "protocol stores.remote sharing",
    "google": "protocol stores.remote",
    "envoy": "sharing",
    "joserfc": "sharing contrib",
    "starlette": "contrib",
    "redis": "stores.redis",
    "pymongo": "stores.mongodb",
    "bson": "stores.mongodb",
    "fsspec": "stores.files",
    "cryptography": "values",
    "sqlalchemy": "moving",
    "marshmallow": "typed",
    "rich": "cli",
    "flask_limiter": "contrib",
    "limits": "contrib",
    "prometheus_client": "contrib",
    "prometheus_flask_exporter": "contrib",
    "flask_debugtoolbar": "contrib",
    "ua_parser": "users.labels",
    "flask_security": "contrib",
    "flask_socketio": "contrib",
}


def name_of(file: Path) -> str:
    """`stores.redis` for stores/redis.py, `stores` for stores/__init__.py, "" for the package."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """The entry of `ROWS` that a module belongs to, or ""."""
    if module in CONTRACT:
        return "stores.base"
    while module and module not in RANK:
        module = module.rpartition(".")[0]
    return module


FILES = {name_of(file): file for file in sorted(PACKAGE.rglob("*.py"))}
INSIDE = [module for module in FILES if module]


def imports(module: str) -> Iterator[str]:
    """The absolute names that a file imports, at its top or inside a function."""
    file = FILES[module]
    package = ["flask_gsession", *file.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            source = ".".join([*base, *filter(None, [node.module])])
            for alias in node.names:
                # `from . import codec` names a file, `from .codec import Codec` does not.
                inside = f"{source}.{alias.name}".removeprefix("flask_gsession.")
                yield f"flask_gsession.{inside}" if inside in FILES else source


def test_every_file_has_a_row() -> None:
    assert [module for module in INSIDE if not room_of(module)] == []


@pytest.mark.parametrize("module", INSIDE)
def test_imports_run_one_way(module: str) -> None:
    rank = RANK[room_of(module)]
    for name in imports(module):
        top, _, target = name.partition(".")
        if top == "flask_gsession":
            assert target, f"{module} imports the package itself instead of the file it needs"
            same_room = room_of(target) == room_of(module)
            assert same_room or RANK[room_of(target)] < rank, f"{module} imports {target}"


@pytest.mark.parametrize("module", [module for module in INSIDE if module.startswith("stores.")])
def test_a_store_knows_only_its_contract(module: str) -> None:
    """It knows nothing of values, cookies or settings, so a new store is an afternoon's work."""
    ours = {name for name in imports(module) if name.startswith("flask_gsession")}
    same_room = [name for name in INSIDE if room_of(name) == room_of(module)]
    names = ("exposure", "interrupts", "rights", "file_locks", "urls")
    means = ["live.listener", *(f"stores.{name}" for name in names)]
    contract = ("errors", "events", "processes", "weak", *CONTRACT, *means, *same_room)
    wire = [name for name in INSIDE if room_of(name) == "protocol"]
    if room_of(module) == "stores.remote":  # which has a language of its own
        contract += (*wire,)
    if room_of(module) == "stores.edge":  # which is made of other stores
        parts = ("stores.sqlite", "stores.wrappers")
        contract += tuple(name for name in INSIDE if room_of(name) in parts)
    assert ours <= {f"flask_gsession.{name}" for name in contract}


@pytest.mark.parametrize("module", INSIDE)
def test_extras_are_imported_in_their_one_place(module: str) -> None:
    for name in imports(module):
        places = PLACES.get(name.partition(".")[0], room_of(module))
        assert room_of(module) in places.split(), f"{module} imports {name}"


@pytest.mark.parametrize("module", [module for module in INSIDE if room_of(module) != "config"])
def test_only_config_reads_app_config(module: str) -> None:
    reads = [
        node.lineno
        for node in ast.walk(ast.parse(FILES[module].read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "config"
    ]
    assert reads == [], f"{module} reads app.config in lines {reads}"


# Mutable values at the top of a file, each with the reason why no application owns it.
OF_THE_PROCESS = {
    "contrib.metrics_figures": {
        "_of_registries",  # a registry of prometheus-client may serve several applications
        "_of_process",  # so may the files of its multiprocess mode
    },
    "contrib.ratelimit_views": {"apps"},  # decorators run before there is an application
    "request.waiting": {"_waiting"},  # threads belong to the process: decision 27
}


@pytest.mark.parametrize("module", INSIDE)
def test_state_lives_in_app_extensions(module: str) -> None:
    """No dict, list or set that is filled at run time at the top of a file."""
    found = set()
    for node in ast.parse(FILES[module].read_text()).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            value, name = ast.unparse(node.value), ast.unparse(target)
            containers = r"\[\]|\{\}|(\w+\.)?(set|dict|list|deque|defaultdict|Weak\w+|local)\(.*"
            if re.fullmatch(containers, value, re.DOTALL) and name.strip("_").islower():
                found.add(name)
    assert found <= OF_THE_PROCESS.get(module, set())


def test_all_lists_the_exported_names() -> None:
    borrowed = {
        alias.asname or alias.name
        for node in ast.walk(ast.parse(FILES[""].read_text()))
        if isinstance(node, ast.ImportFrom) and node.level == 0
        for alias in node.names
    }
    ours = {
        name
        for name, value in vars(flask_gsession).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert ours - borrowed == set(flask_gsession.__all__) - {"__version__"}


def test_importing_the_package_loads_no_extra() -> None:
    code = "import sys, flask_gsession; print(*sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    loaded = {name.partition(".")[0] for name in run.stdout.split()}
    assert "flask_gsession" in loaded
    assert "flask_gsession.live.hints" not in run.stdout.split()
    assert loaded.isdisjoint(PLACES)


def test_a_clock_for_tests_does_not_load_the_store_contract() -> None:
    code = "import sys; from flask_gsession.testing import FakeClock; print(*sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    loaded = run.stdout.split()
    assert "flask_gsession.testing.clock" in loaded
    assert "flask_gsession.testing.contract" not in loaded


def test_benchmarks_and_helpers_import_no_test_module() -> None:
    """The code that benchmarks share with tests is in `tests/harness`."""
    top = PACKAGE.parent
    files = [*top.glob("benchmarks/**/*.py"), *top.glob("tests/harness/*.py")]
    for file in files:
        for line in file.read_text().splitlines():
            words = line.split()
            if words[:1] in (["from"], ["import"]):
                assert ".test_" not in words[1], f"{file.name}: {line.strip()}"
    assert len(files) > 20
