"""Typed keys that are declared while another thread looks for them."""

from __future__ import annotations

from marshmallow import fields

from flask_gsession.typed import SessionKey
from flask_gsession.values.merge import DECLARED


def test_a_typed_key_is_declared_while_another_thread_goes_through_its_namesakes() -> None:
    keys = [SessionKey("namesake", fields.Integer())]
    found = iter(DECLARED["namesake"])
    next(found)
    keys.append(SessionKey("namesake", fields.Integer()))
    assert [*found] == []
    assert {*map(id, DECLARED["namesake"])} == {*map(id, keys)}
