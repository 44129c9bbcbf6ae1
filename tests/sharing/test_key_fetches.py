"""Signing keys that several threads need while one fetches them."""

from __future__ import annotations

import time
from threading import Thread
from typing import Any

import pytest
from joserfc import jwt
from joserfc.jwk import ECKey

from flask_gsession.contrib.oidc_tokens import KeysUnavailable, ProviderKeys
from flask_gsession.errors import PassportRefused
from flask_gsession.sharing.passport import PassportReader


class Fetches:
    """Fetches keys. Another thread, which needs them too, starts ``meanwhile``."""

    def __init__(self, keys: Any) -> None:
        self.keys = keys
        self.meanwhile = Thread()

    def __call__(self) -> Any:
        self.meanwhile.start()  # a second fetch would fail here
        self.meanwhile.join(0.2)  # unless it waits for this fetch
        return self.keys


def test_passports_are_read_while_another_thread_fetches_the_keys() -> None:
    key = ECKey.generate_key("P-256", {"kid": "1", "alg": "ES256"})
    claims = {"iss": "shop", "aud": "billing", "sub": "17", "jti": "1"}
    claims |= {"iat": int(time.time()), "exp": int(time.time()) + 60}
    text = jwt.encode({"alg": "ES256", "kid": "1"}, claims, key)
    fetch, users = Fetches({"keys": [key.as_dict(private=False)]}), []
    reader = PassportReader(fetch, "shop", "billing", once=False)
    fetch.meanwhile = Thread(target=lambda: users.append(reader.read(text).user))
    users.append(reader.read(text).user)
    fetch.meanwhile.join(30)
    assert users == ["17", "17"]


def test_logout_tokens_are_read_while_another_thread_fetches_the_keys() -> None:
    key = ECKey.generate_key("P-256", {"kid": "1", "use": "sig"})
    fetch, found = Fetches({"keys": [key.as_dict(private=False)]}), []
    keys = ProviderKeys(fetch)
    fetch.meanwhile = Thread(target=lambda: found.append(len(keys.candidates("1"))))
    found.append(len(keys.candidates("1")))
    fetch.meanwhile.join(30)
    assert found == [1, 1]


def test_a_fetch_of_keys_may_check_tokens_itself() -> None:
    """As a service does in its own requests, for example. The keys aren't there yet."""

    def read() -> None:
        with pytest.raises(PassportRefused):
            reader.read("x.y.z")

    def fetch_and_read() -> Any:
        read()
        return keys

    def fetch_and_check() -> Any:
        with pytest.raises(KeysUnavailable):
            logouts.candidates("1")
        return keys

    key = ECKey.generate_key("P-256", {"kid": "1", "use": "sig"})
    keys = {"keys": [key.as_dict(private=False)]}
    reader = PassportReader(fetch_and_read, "shop", "billing")
    logouts = ProviderKeys(fetch_and_check)
    for call in (read, lambda: logouts.candidates("1")):
        thread = Thread(target=call, daemon=True)
        thread.start()
        thread.join(5)
        assert not thread.is_alive()
