"""G7: a token is a secret, and ours."""

from __future__ import annotations

import base64
import hashlib
import hmac
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flask_gsession.tokens import (
    Checked,
    TokenSigner,
    is_token,
    new_token,
    session_key,
)

ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"

TOKEN = new_token()
SIGNER = TokenSigner(["the key"], "session")
SIGNED = SIGNER.sign(TOKEN)


# Making --------------------------------------------------------------------------------------


def test_tokens_are_256_random_bits() -> None:
    tokens = {new_token() for _ in range(10_000)}
    assert len(tokens) == 10_000
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{43}", token) for token in tokens)
    for place in range(43):
        seen = {token[place] for token in tokens}
        # The last character holds the 4 bits that remain of 256.
        assert len(seen) == (64 if place < 42 else 16), place


@pytest.mark.parametrize("nbytes", [16, 32, 64])
def test_the_number_of_bytes_can_be_chosen(nbytes: int) -> None:
    token = new_token(nbytes)
    assert len(base64.urlsafe_b64decode(token + "==")) == nbytes
    assert is_token(token)


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("a" * 22, True),
        ("a" * 200, True),
        ("a" * 21, False),
        ("a" * 201, False),
        ("", False),
        ("a" * 43 + "\n", False),
        ("a" * 42 + "=", False),
        ("a" * 42 + ".", False),
        ("a" * 42 + " ", False),
        ("a" * 42 + "ä", False),
        ("\u0661" * 43, False),  # digits, though not of ASCII
        (b"a" * 43, False),
        (43, False),
        (None, False),
    ],
)
def test_valid_tokens(text: object, verdict: bool) -> None:
    assert is_token(text) is verdict


def test_the_session_key_is_the_sha_256_of_the_token() -> None:
    digest = hashlib.sha256(b"token").digest()
    assert session_key("token") == base64.urlsafe_b64encode(digest).decode().rstrip("=")
    assert len(session_key(TOKEN)) == 43
    assert TOKEN not in session_key(TOKEN)


def test_tracebacks_and_debuggers_show_no_token() -> None:
    assert TOKEN not in repr(TOKEN) + repr([TOKEN]) + f"{TOKEN!r}"
    assert TOKEN not in repr(SIGNER.check(SIGNED))
    assert TOKEN not in repr(SIGNER) + repr(vars(SIGNER))
    assert f"{TOKEN}" == str(TOKEN)
    assert is_token(TOKEN)


# Signing -------------------------------------------------------------------------------------


def right(token: str, *, outdated: bool = False) -> Checked:
    """The result of a check that finds nothing wrong."""
    return Checked(token, outdated=outdated, key=session_key(token))


def test_a_signed_token_is_the_token_and_128_bits() -> None:
    token, _, signature = SIGNED.rpartition(".")
    assert token == TOKEN
    assert len(base64.urlsafe_b64decode(signature + "==")) == 16
    assert SIGNER.check(SIGNED) == right(TOKEN)


def test_the_signature_is_hmac_under_a_derived_key() -> None:
    """Part of the stored format: a change here logs everybody out."""
    label = b"flask-gsession token 1 session"
    derived = hmac.digest(b"the key", label, "sha256")
    mac = hmac.digest(derived, TOKEN.encode(), "sha256")[:16]
    signature = base64.urlsafe_b64encode(mac).decode().rstrip("=")
    assert f"{TOKEN}.{signature}" == SIGNED


def test_keys_may_be_text_or_bytes() -> None:
    assert TokenSigner([b"the key"], "session").check(SIGNED) == right(TOKEN)
    assert TokenSigner(["schlüssel"], "session").sign(TOKEN) == TokenSigner(
        ["schlüssel".encode()], "session"
    ).sign(TOKEN)


@given(st.binary(min_size=16, max_size=64), st.binary(min_size=1), st.text(max_size=20))
def test_signed_tokens_check(entropy: bytes, key: bytes, purpose: str) -> None:
    token = base64.urlsafe_b64encode(entropy).decode().rstrip("=")
    signer = TokenSigner([key], purpose)
    assert signer.check(signer.sign(token)) == right(token)


def test_a_fallback_key_is_accepted_and_said_to_be_outdated() -> None:
    signer = TokenSigner(["new", "older", "the key"], "session")
    assert signer.check(SIGNED) == right(TOKEN, outdated=True)
    assert signer.check(signer.sign(TOKEN)) == right(TOKEN)
    assert TokenSigner(["new"], "session").check(signer.sign(TOKEN)) == right(TOKEN)


def test_a_key_that_went_is_refused() -> None:
    assert TokenSigner(["new", "older"], "session").check(SIGNED) == Checked(None, "bad signature")


def test_a_token_of_one_cookie_means_nothing_in_another() -> None:
    other = TokenSigner(["the key"], "admin_session")
    assert other.sign(TOKEN) != SIGNED
    assert other.check(SIGNED) == Checked(None, "bad signature")


@pytest.mark.parametrize("position", range(len(SIGNED)))
def test_every_changed_character_is_refused(position: int) -> None:
    for char in [*ALPHABET, "."]:
        if char != SIGNED[position]:
            tampered = SIGNED[:position] + char + SIGNED[position + 1 :]
            assert SIGNER.check(tampered).token is None


@given(st.text(ALPHABET, min_size=43, max_size=43), st.text(ALPHABET, min_size=22, max_size=22))
def test_a_made_up_signature_is_refused(token: str, signature: str) -> None:
    assert SIGNER.check(f"{token}.{signature}") == Checked(None, "bad signature")


def test_signatures_of_two_tokens_cannot_be_swapped() -> None:
    other = new_token()
    signature = SIGNER.sign(other).partition(".")[2]
    assert SIGNER.check(f"{TOKEN}.{signature}") == Checked(None, "bad signature")


def test_a_signature_that_was_right_is_checked_without_a_hash(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Any other signature of the same token is hashed again. No token is kept."""
    monkeypatch.setattr("flask_gsession.tokens._MOST_KNOWN", 3)
    signer = TokenSigner(["the key", "older"], "session")
    outdated = TokenSigner(["older"], "session").sign(TOKEN)
    made_up = f"{TOKEN}.{SIGNER.sign(new_token()).partition('.')[2]}"
    for _ in range(2):
        assert signer.check(SIGNED) == right(TOKEN)
        assert signer.check(outdated) == right(TOKEN, outdated=True)
        assert signer.check(made_up) == Checked(None, "bad signature")
    with monkeypatch.context() as patch:
        patch.setattr("flask_gsession.tokens._Mac.signature", None)
        assert signer.check(SIGNED) == right(TOKEN)
        with pytest.raises(TypeError):
            signer.check(made_up)
    for _ in range(9):
        signer.check(signer.sign(new_token()))
        assert len(signer._known) <= 3
    assert TOKEN not in repr(vars(signer))


# Wrong tokens from browsers and others -------------------------------------------------------

OTHERS = TokenSigner(["another application's key"], "session").sign(TOKEN)
SIGNATURE = SIGNED.rpartition(".")[2]

BAD = {
    "empty": "",
    "one character": "a",
    "42 characters": "a" * 42,
    "44 characters": "a" * 44,
    "4 KB": "a" * 4096,
    "200 KB": "a" * 204_800,
    "200 KB with a signature": "a" * 204_800 + "." + SIGNATURE,
    "NUL": "\0",
    "NUL inside": SIGNED[:10] + "\0" + SIGNED[11:],
    "NUL behind": SIGNED + "\0",
    "CR and LF": SIGNED[:10] + "\r\n" + SIGNED[12:],
    "LF behind": SIGNED + "\n",
    "LF before": "\n" + SIGNED,
    "spaces around": f" {SIGNED} ",
    "invalid UTF-8 as Werkzeug reads it": "\udcff\udcfe" + SIGNED[2:],
    "Latin-1": "ÿ" + SIGNED[1:],
    "not ASCII, yet of one width": SIGNED[:-1] + "\uff21",
    "digits of another script": "\u0661" * 43 + "." + SIGNATURE,
    "percent-encoded": SIGNED.replace(".", "%2E"),
    "percent-encoded letter": f"%{ord(SIGNED[0]):02X}{SIGNED[1:]}",
    "a hash tag of Redis": "{tag}" + SIGNED[5:],
    "a pattern of Redis": "*" * 43 + "." + SIGNATURE,
    "one character of a pattern": "?" + SIGNED[1:],
    "a lock's name": f"{TOKEN}:lock",
    "a lock's name, signed in form": f"{TOKEN}:lock.{SIGNATURE}",
    "a path": "../../etc/passwd",
    "a path, signed in form": f"../../etc/passwd.{SIGNATURE}",
    "an operator of MongoDB": '{"$gt": ""}',
    "SQL": "' OR 1=1 --",
    "unsigned": TOKEN,
    "empty signature": f"{TOKEN}.",
    "no token": f".{SIGNATURE}",
    "only a dot": ".",
    "dots": "." * 66,
    "cut signature": SIGNED[:-1],
    "longer signature": SIGNED + "A",
    "padded signature": SIGNED + "==",
    "two signatures": f"{SIGNED}.{SIGNATURE}",
    "upper case": SIGNED.upper(),
    "another alphabet": SIGNED.replace("-", "+").replace("_", "/") + "+",
    "session key instead of the token": f"{session_key(TOKEN)}.{SIGNATURE}",
    "the session key alone": session_key(TOKEN),
    "another application's": OTHERS,
    "Flask's own cookie": "eyJ1c2VyIjo3fQ.ZxYk1w.4m2Zf0m0dG9rZW4tc2lnbmF0dXJl",
}


@pytest.mark.parametrize("presented", BAD.values(), ids=BAD)
def test_tokens_we_did_not_sign_are_refused(presented: str) -> None:
    checked = SIGNER.check(presented)
    assert checked.token is None
    assert checked.reason in ("malformed", "bad signature")
    assert not checked.outdated


@pytest.mark.parametrize(
    "presented",
    [
        base64.urlsafe_b64encode(b"a" * 31).decode(),
        "a" * 220 + "." + SIGNATURE,
        "é" * 43 + "." + SIGNATURE,
        SIGNED[:-1] + "é",
        SIGNED[:-1],
        SIGNED + "A",
        f"{TOKEN}.",
        f".{SIGNATURE}",
        "",
    ],
    ids=[str(number) for number in range(9)],
)
def test_malformed_tokens(presented: str) -> None:
    assert SIGNER.check(presented) == Checked(None, "malformed")


@given(st.text(st.characters()) | st.text(ALPHABET + ".", min_size=60, max_size=70))
def test_any_text_is_refused_without_an_error(presented: str) -> None:
    assert SIGNER.check(presented).token is None


def test_the_unused_bits_of_a_signature_must_be_right_too() -> None:
    """22 characters hold 132 bits: other spellings of the same 128 are no second signature."""
    last = ALPHABET.index(SIGNED[-1])
    assert last % 16 == 0
    for spare in range(1, 16):
        spelling = SIGNED[:-1] + ALPHABET[last + spare]
        assert base64.urlsafe_b64decode(spelling[-22:] + "==") == base64.urlsafe_b64decode(
            SIGNATURE + "=="
        )
        assert SIGNER.check(spelling) == Checked(None, "bad signature")
