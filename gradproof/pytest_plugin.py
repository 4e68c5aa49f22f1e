"""The pytest plugin: options, one parametrised subject per adapter and dtype, a header and a summary.

Registered by its `pytest11` entry point. It does nothing to tests that do not ask for its fixtures.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:  # the harness is only imported when a test asks for it, so that other suites start fast
    from gradproof.run.check import Run

DEFAULT_ADAPTERS = ("reference", "torch", "jax")
DEFAULT_NETWORKS = 50
PROPERTY = "gradproof"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gradproof", "gradient conformance (gradproof)")
    group.addoption(
        "--gradproof-adapter",
        action="append",
        metavar="A",
        help="adapter to validate; repeatable (default: all built in)",
    )
    group.addoption(
        "--gradproof-dtype",
        action="append",
        metavar="D",
        help="float64, float32, bfloat16 or float16; repeatable (default: the first two)",
    )
    group.addoption(
        "--gradproof-layer", action="append", metavar="L", help="draw only networks with this layer; repeatable"
    )
    group.addoption(
        "--gradproof-networks",
        type=int,
        metavar="N",
        help=f"random networks per adapter and dtype (default {DEFAULT_NETWORKS})",
    )
    group.addoption(
        "--gradproof-layers", action="append", metavar="FILE.py", help="layers of yours, and rows for them; repeatable"
    )
    group.addoption(
        "--gradproof-strict",
        action="store_true",
        help="let an honest algorithm that loses digits disagree too",
    )
    group.addoption(
        "--gradproof-arithmetic",
        metavar="CLASS",
        default="every",
        help="demand that no layer rounds more in half precision: inside, stored or every (default)",
    )


@dataclass(frozen=True)
class Target:
    """What one conformance test validates: an adapter, by name, in one dtype."""

    adapter: str
    dtype: str

    def __str__(self) -> str:
        return f"{self.adapter}-{self.dtype}"


def pytest_configure(config: pytest.Config) -> None:
    """Unknown names end the session before it collects, with the valid ones."""
    config.pluginmanager.register(Summary(), "gradproof-summary")
    networks = config.getoption("--gradproof-networks")
    if networks is not None and networks < 1:
        raise pytest.UsageError(f"--gradproof-networks: expected an integer of at least 1, got {networks}")
    if config.getoption("--gradproof-layers"):
        _load_own_layers(config.getoption("--gradproof-layers"))
    named = any(config.getoption(name) for name in ("--gradproof-adapter", "--gradproof-dtype", "--gradproof-layer"))
    if named or config.getoption("--gradproof-arithmetic") != "every":
        _require_known_names(config)


def _load_own_layers(files: Sequence[str]) -> None:
    from gradproof.subject.own_layers import OwnLayersError, load_layers

    try:
        for each in files:
            load_layers(each)
    except OwnLayersError as error:
        raise pytest.UsageError(str(error)) from None


def _require_known_names(config: pytest.Config) -> None:
    from gradproof.model.adapter import AdapterError
    from gradproof.model.dtypes import VALID_DTYPES
    from gradproof.reference import LAYERS
    from gradproof.run.check import UsageError, require_known
    from gradproof.subject.own_layers import OwnLayersError, load_installed_layers
    from gradproof.subject.registry import load_adapter
    from gradproof.verdict.equations import ARITHMETICS

    try:
        load_installed_layers()
        require_known("dtype", config.getoption("--gradproof-dtype") or (), VALID_DTYPES)
        require_known("layer", config.getoption("--gradproof-layer") or (), LAYERS)
        require_known("arithmetic", [config.getoption("--gradproof-arithmetic")], ARITHMETICS)
        for name in config.getoption("--gradproof-adapter") or ():
            load_adapter(name)
    except (AdapterError, OwnLayersError, UsageError) as error:
        raise pytest.UsageError(str(error)) from None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test per adapter and dtype for every test that asks for a `gradproof_run`."""
    if "gradproof_run" not in metafunc.fixturenames:
        return
    from gradproof.model.dtypes import DTYPES

    adapters: Sequence[str] = metafunc.config.getoption("--gradproof-adapter") or DEFAULT_ADAPTERS
    dtypes: Sequence[str] = metafunc.config.getoption("--gradproof-dtype") or DTYPES
    targets = [Target(adapter, dtype) for adapter in dict.fromkeys(adapters) for dtype in dict.fromkeys(dtypes)]
    metafunc.parametrize("target", targets, ids=str)


@pytest.fixture
def gradproof_layers(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """The layers named with --gradproof-layer, none for all."""
    return tuple(request.config.getoption("--gradproof-layer") or ())


@pytest.fixture
def gradproof_networks(request: pytest.FixtureRequest) -> int:
    """The number of networks asked for with --gradproof-networks."""
    return int(request.config.getoption("--gradproof-networks") or DEFAULT_NETWORKS)


@pytest.fixture
def gradproof_run(request: pytest.FixtureRequest, target: Target) -> Iterator[Run]:
    """A run for this target; what it counts appears in the terminal summary, from xdist workers too.

    A built-in adapter whose framework is missing skips; one that was asked for by name is an error.
    """
    from gradproof.model.adapter import AdapterError
    from gradproof.run.check import Run
    from gradproof.subject.own_layers import load_installed_layers
    from gradproof.subject.registry import load_adapter

    load_installed_layers()
    try:
        adapter = load_adapter(target.adapter)
    except AdapterError as error:
        if request.config.getoption("--gradproof-adapter"):
            raise
        pytest.skip(str(error))
    option = request.config.getoption
    demands = {"strict": option("--gradproof-strict"), "arithmetic": option("--gradproof-arithmetic")}
    run = Run({target.adapter: adapter}, [target.dtype], **demands)
    yield run
    for tally in run.report.tallies.values():
        counts = (
            f"{adapter.name} {adapter.version()}",
            target.dtype,
            run.report.networks,
            tally.gradients,
            tally.worst,
        )
        request.node.user_properties.append((PROPERTY, counts))


def pytest_report_collectionfinish(config: pytest.Config, items: Sequence[pytest.Item]) -> list[str]:
    """The versions of the adapters, where a test asks for them: other suites see nothing of this plugin."""
    if not any("gradproof_run" in getattr(each, "fixturenames", ()) for each in items):
        return []
    from gradproof.subject.registry import describe_adapter

    adapters = config.getoption("--gradproof-adapter") or DEFAULT_ADAPTERS
    return ["gradproof: " + ", ".join(map(describe_adapter, adapters))]


class Summary:
    """What the runs of all tests counted, printed at the end; reports carry it, so xdist workers count too."""

    def __init__(self) -> None:
        self.counted: dict[tuple[str, str], tuple[int, int, float]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "teardown":
            return
        properties: Sequence[tuple[str, Any]] = report.user_properties
        for name, counts in properties:
            if name == PROPERTY:
                self._add(*counts)

    def _add(self, adapter: str, dtype: str, networks: int, gradients: int, worst: float) -> None:
        before = self.counted.get((adapter, dtype), (0, 0, 0.0))
        self.counted[adapter, dtype] = (before[0] + networks, before[1] + gradients, max(before[2], worst))

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """One line per adapter and dtype: networks, gradients compared, worst agreement in noise units."""
        if not self.counted:
            return
        terminalreporter.section("gradproof")
        for (adapter, dtype), (networks, gradients, worst) in sorted(self.counted.items()):
            terminalreporter.write_line(
                f"{adapter} {dtype}: {networks} networks, {gradients} gradients compared, "
                f"worst agreement {worst:.1f} noise units"
            )
