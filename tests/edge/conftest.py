"""A centre on each store in turn, and an edge of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.edge.story import POLICIES
from tests.harness.apps import SiteMaker
from tests.harness.edges import EdgeSite, Network


@pytest.fixture
def network(make_site: SiteMaker, tmp_path: Path) -> Network:
    return Network(make_site, tmp_path, merge_policies=POLICIES)


@pytest.fixture
def edge(network: Network) -> Iterator[EdgeSite]:
    with network.edge() as edge:
        yield edge
