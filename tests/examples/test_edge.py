"""The branch that goes on selling while its line to the head office is cut."""

import time
from collections.abc import Callable, Iterator

import pytest

from tests.harness.examples import START, Browser, running


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The head office's port; then come the branch and the switch of the line."""
    with running("examples.edge", 5, tmp_path_factory.mktemp("edge")) as port:
        yield port


def until(done: Callable[[], object]) -> None:
    deadline = time.monotonic() + START
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_branch_keeps_selling_and_settles(port: int) -> None:
    office, branch, switch = port, port + 1, port + 2
    ada, bob, eve = Browser(), Browser(), Browser()
    for browser in (ada, eve):
        browser.ask(branch, "POST", "/login", user="ada")
    ada.ask(branch, "POST", "/add", good="mug")
    assert "The line is up" in ada.ask(branch, "GET", "/")[1]

    assert bob.ask(switch, "POST", "/cut")[0] == 303
    until(lambda: "The line is cut" in ada.ask(branch, "GET", "/")[1])
    ada.ask(branch, "POST", "/buy")
    bob.ask(branch, "POST", "/add", good="pot")  # a visitor that nobody knows yet
    assert bob.ask(branch, "POST", "/login", user="bob")[0] == 503
    kept = eve.cookie
    eve.ask(branch, "POST", "/logout")
    eve.cookie = kept
    assert "Nobody is signed in" in eve.ask(branch, "GET", "/")[1]
    ada.ask(office, "POST", "/add", good="cup")
    eve.cookie = kept
    assert "ada" in eve.ask(office, "GET", "/")[1]  # the head office can't know

    bob.ask(switch, "POST", "/mend")
    until(lambda: "The line is up. 0 changes and" in ada.ask(branch, "GET", "/")[1])
    for place in (office, branch):
        assert "Bought: 1 x mug" in ada.ask(place, "GET", "/")[1]
        assert "1 x cup" in ada.ask(place, "GET", "/")[1]
        assert "1 x pot" in bob.ask(place, "GET", "/")[1]
        eve.cookie = kept
        assert "Nobody is signed in" in eve.ask(place, "GET", "/")[1]
