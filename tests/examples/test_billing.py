"""The shop and its billing: two services, one session, and different rights."""

from collections.abc import Iterator

import pytest

from tests.harness.examples import Browser, running


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The shop's port; the billing is at the next one."""
    with running("examples.billing", 3, tmp_path_factory.mktemp("billing")) as port:
        yield port


def test_the_billing_writes_into_the_session_of_the_shop(port: int) -> None:
    browser = Browser()
    browser.ask(port, "POST", "/add", good="mug")
    browser.ask(port, "POST", "/add", good="pot")
    assert "mug, pot. Invoice: none" in browser.ask(port, "GET", "/")[1]
    assert browser.ask(port + 1, "POST", "/pay")[0] == 302
    page = browser.ask(port, "GET", "/")[1]
    assert "In your cart: nothing" in page
    assert " over 33 euros" in page
    assert browser.ask(port + 1, "POST", "/pay")[0] == 400


def test_the_billing_sees_nothing_else(port: int) -> None:
    browser = Browser()
    browser.ask(port, "POST", "/add", good="mug")
    assert browser.ask(port + 1, "GET", "/address")[0] == 403


def test_a_logout_at_the_shop_is_one_at_the_billing(port: int) -> None:
    browser = Browser()
    browser.ask(port, "POST", "/add", good="mug")
    kept = browser.cookie
    browser.ask(port, "POST", "/logout")
    browser.cookie = kept
    assert browser.ask(port + 1, "POST", "/pay")[0] == 401
    assert Browser().ask(port + 1, "POST", "/pay")[0] == 401
