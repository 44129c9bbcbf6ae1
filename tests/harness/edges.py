"""A centre and edge nodes of it, whose wires a test cuts.

::

    network = Network(make_site, tmp_path)
    edge = network.edge("a", merge_policies={"n": "counter"})
    edge.cut()
    ...
    edge.back()
    edge.settle()
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from flask_gsession.errors import StoreUnavailable
from flask_gsession.stores import Store, StoreOptions, open_store
from flask_gsession.stores.base import Clock
from flask_gsession.stores.edge import EdgeStore
from flask_gsession.stores.parts import Settled
from flask_gsession.stores.wrappers import CallWrapper
from flask_gsession.testing import HookedStore
from tests.harness.apps import PATIENCE, Site, SiteMaker


class Wire(CallWrapper):
    """The way to a store. ``cut``: no call gets there. ``mute``: none of its answers come back."""

    def __init__(self, store: Store) -> None:
        super().__init__(store, self._carry)
        self.cut = self.mute = False
        self.calls: list[str] = []
        #: run before and after each call, with the operation's name
        self.hook: Callable[[str], object] = lambda operation: None
        self.after: Callable[[str], object] = lambda operation: None

    def _carry(self, operation: str, method: Callable[..., Any], *arguments: Any) -> Any:
        self.hook(operation)
        if self.cut:
            raise StoreUnavailable("the wire is cut")
        self.calls.append(operation)
        answer = method(*arguments)
        self.after(operation)
        if self.mute:
            raise StoreUnavailable("the answer was lost")
        return answer


class EdgeSite(Site):
    """An application on an edge node."""

    wire: Wire
    edge: EdgeStore

    def cut(self) -> None:
        """Cut the wire; this process knows at once."""
        self.wire.cut = True
        self.edge.link.mark_cut(StoreUnavailable("the wire is cut"))

    def back(self) -> None:
        """Mend the wire. Nobody has noticed yet."""
        self.wire.cut = self.wire.mute = False

    def settle(self) -> Settled:
        """Mend the wire, and settle until nothing is queued."""
        self.back()
        settled = self.edge.settle()
        assert settled is not None
        return settled


class Network:
    """A centre, which is a site of its own, and its edges."""

    def __init__(self, make_site: SiteMaker, folder: Path, **settings: Any) -> None:
        self._folder = folder
        self.settings = settings
        self.centre = make_site(**settings)

    def edge(
        self, name: str = "a", *, clock: Clock | None = None, again: bool = False, **how: Any
    ) -> EdgeSite:
        """Another node; or another process of it, for the same ``name``. ``how``: of its store.

        ``remote``: the URL of the centre, if it isn't the centre's own.
        """
        centre, clock = self.centre, clock or self.centre.clock
        path = self._folder / f"{how.pop('file', name)}.sqlite3"
        timeout = how.pop("timeout", PATIENCE)
        options = StoreOptions(prefix=centre.prefix, clock=clock, timeout=timeout, edge_sync=0)
        # A store in memory is the same one for everybody.
        remote = how.pop("remote", centre.url)
        shares = remote == "memory://"
        far = centre.store.store if shares else open_store(remote, options)[0]
        wire = Wire(far)
        settings = {**self.settings, **how.pop("settings", {})}
        store = EdgeStore(path, wire, options, owns_centre=not shares, **how)
        site = EdgeSite("edge:", centre.prefix, clock, store=HookedStore(store), **settings)
        site.wire, site.edge = wire, store
        return site
