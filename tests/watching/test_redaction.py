"""The values of a session that debugging may show."""

from __future__ import annotations

import datetime as dt
import re
import time
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import Markup

from flask_gsession.watching.redaction import HIDDEN, is_secret, shown_name, shown_value

CANARY = "hidden canary"


@pytest.mark.parametrize(
    "name",
    [
        *("password", "user_password", "passwd", "pwd", "token", "access_token", "refreshToken"),
        *("secret", "CLIENT_SECRET", "csrf_token", "_csrf", "xsrf", "key", "api_key", "apikey"),
        *("credentials", "auth", "Authorization", "bearer", "cookie", "jwt", "nonce", "otp"),
        *("salt", "pw_hash", "signature", "private", "code_verifier", "card", "cvv", "iban"),
        *("ssn", "pin", "PIN", "user_pin", "sid", "reset_code", "verificationCode", "backup_codes"),
        *("sms_code", "2fa-code", "dsn", "database_dsn", "PW", "db_pw"),
    ],
)
def test_values_with_the_name_of_a_secret_are_never_shown(name: str) -> None:
    assert is_secret(name)
    assert shown_value(name, CANARY, {name}) == HIDDEN
    assert CANARY not in shown_value("cart", {"deep": [{name: CANARY}]}, {"cart"})


@pytest.mark.parametrize(
    "name", ["cart", "theme", "user_id", "author", "shipping", "side", "country_code"]
)
def test_other_names_are_not_secret(name: str) -> None:
    assert not is_secret(name)
    assert shown_value(name, "shown", {name}) == "'shown'"


def test_undeclared_values_are_not_shown() -> None:
    assert shown_value("cart", CANARY, ()) == HIDDEN
    assert shown_value("cart", CANARY, {"theme"}) == HIDDEN


@pytest.mark.parametrize(
    "value", [CANARY.encode(), bytearray(CANARY.encode()), type(CANARY, (), {})]
)
def test_bytes_and_unknown_types_are_never_shown(value: Any) -> None:
    for inside in (value, [value], {"photo": value}, (1, (value,))):
        assert CANARY not in shown_value("cart", inside, {"cart"})
        assert HIDDEN in shown_value("cart", inside, {"cart"})


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"a": [1, 2.5, None], "b": (True,)}, "{'a': [1, 2.5, None], 'b': (True)}"),
        ({7}, "{7}"),
        (frozenset(), "{}"),
        (Decimal("1.50"), "1.50"),
        (dt.date(2026, 1, 2), "2026-01-02"),
        (Markup("<b>"), "'<b>'"),
        ("line\nbreak \u2028", "'line\\nbreak \\u2028'"),
        ("x" * 101, "'" + "x" * 100 + "'..."),
        (list(range(11)), "[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ...]"),
        ([[[[[[1]]]]]], "[[[[[...]]]]]"),
        ("\ud800", "'\\ud800'"),
        ([16**9999], "[0x1" + "0" * 97 + "]"),
    ],
)
def test_a_value_is_shown_in_one_line_and_not_too_long(value: Any, text: str) -> None:
    assert shown_value("cart", value, {"cart"}) == text


def test_a_value_that_holds_itself_is_shown() -> None:
    loop: list[Any] = []
    loop.append(loop)
    assert shown_value("cart", loop, {"cart"}) == "[[[[[...]]]]]"


def test_a_key_that_holds_a_secret_is_cut() -> None:
    for secret in (
        "Qm-3tR_9vLw0zXyBn5kHsUeDc7jGpAf2iOqVlT8bWxE",
        "Y7nBqTz0sKc2mWvXf4hLgRj8aDeP1u",
        "ab12" * 8,
        "a" * 40,
    ):
        for name in (f"_state_google_{secret}", f"reset:{secret}", secret):
            assert secret not in shown_name(name)
            assert secret[8:] not in shown_name(name)
    assert (
        shown_name("preferences_of_the_user_in_the_shop") == "preferences_of_the_user_in_the_shop"
    )
    assert shown_name("line\nbreak") == "line\\nbreak"
    assert len(shown_name("a b " * 100)) < 70


# Clients choose names -------------------------------------------------------------------------

BEFORE = re.compile(  # the pattern that was simple, and slow
    r"(?=[\w-]*[0-9])(?=[\w-]*[A-Z])[\w-]{20,}|(?=[A-Za-z]*[0-9])[A-Za-z0-9]{16,}|[A-Za-z0-9]{32,}",
    re.ASCII,
)


@given(
    st.text(st.sampled_from("aZ0_- é"), max_size=80) | st.text(st.sampled_from("aB3"), max_size=80)
)
def test_names_that_look_random_are_cut(name: str) -> None:
    expected = ascii(BEFORE.sub(lambda found: found[0][:4] + "...", name))[1:-1]
    shown = shown_name(name)
    assert shown == expected or shown == expected[:60] + "..."


@pytest.mark.parametrize(
    "piece", ["ab-", "verif", "confirm", "a", "A-", "Z", "0_", "verification code", "auth", "pin"]
)
@pytest.mark.parametrize("look", [shown_name, is_secret])
def test_a_long_name_takes_no_longer_than_its_length(look: Any, piece: str) -> None:
    """Ten times as long, about ten times as much: not a hundred times."""

    def fastest(length: int) -> float:
        name, times = piece * (length // len(piece)), []
        for _ in range(3):
            begin = time.thread_time()
            look(name)
            times.append(time.thread_time() - begin)
        return min(times)

    assert fastest(200_000) < max(0.1, 40 * fastest(20_000))
