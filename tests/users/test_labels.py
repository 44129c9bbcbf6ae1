"""The label of a device, from its user agent."""

from __future__ import annotations

from functools import partial

import pytest

from flask_gsession.users import labels
from flask_gsession.users.labels import device_label
from tests.harness.apps import SiteMaker

APPLE = "AppleWebKit/605.1.15 (KHTML, like Gecko)"
AGENTS = {
    "Mozilla/5.0 (Windows NT 10.0; Win64; x64; rv:128.0) Gecko/20100101 Firefox/128.0": (
        "Firefox on Windows"
    ),
    f"Mozilla/5.0 (iPhone; CPU iPhone OS 17_5 like Mac OS X) {APPLE} Version/17.5 Mobile/15E148 "
    "Safari/604.1": "Safari on iPhone",
    f"Mozilla/5.0 (iPad; CPU OS 17_5 like Mac OS X) {APPLE} CriOS/125 Mobile/15E148 Safari/604.1": (
        "Chrome on iPad"
    ),
    f"Mozilla/5.0 (Macintosh; Intel Mac OS X 10_15_7) {APPLE} HeadlessChrome/131.0.0.0 "
    "Safari/537.36": "Chrome on macOS",
    f"Mozilla/5.0 (Windows NT 10.0) {APPLE} Chrome/131.0.0.0 Safari/537.36 Edg/131.0.0.0": (
        "Edge on Windows"
    ),
    f"Mozilla/5.0 (X11; CrOS x86_64 14541.0.0) {APPLE} Chrome/131.0.0.0 Safari/537.36": (
        "Chrome on ChromeOS"
    ),
    "Mozilla/5.0 (Android 14; Mobile; rv:128.0) Gecko/128.0 Firefox/128.0": "Firefox on Android",
    "curl/8.5.0": "curl",
    "": "",
    "\x01\ud800": "",
    "Mozilla/5.0 " + "(" * 100_000: "",
}


@pytest.mark.parametrize("parser", [True, False], ids=["ua-parser", "plain"])
def test_labels(parser: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert labels._has_parser(), "the tests need it"
    monkeypatch.setattr(labels, "_has_parser", lambda: parser)
    assert {agent: device_label(agent) for agent in AGENTS} == AGENTS


@pytest.mark.parametrize("store_url", ["memory"], indirect=True)
def test_a_sign_in_labels_its_device(make_site: SiteMaker) -> None:
    agent = {"User-Agent": next(iter(AGENTS))}
    on, off = make_site(), make_site(device_labels=False)
    for site, user, how, label in (
        (on, "ada", {}, "Firefox on Windows"),
        (on, "bob", {"label": "My desk"}, "My desk"),
        (off, "eve", {}, None),
    ):
        sign_in = partial(lambda session, user, how: session.bind(user, **how), user=user, how=how)
        site.visitor().run(sign_in, headers=agent)
        with site.app.app_context():
            (device,) = site.ext.users.devices(user)
        assert device.label == label
