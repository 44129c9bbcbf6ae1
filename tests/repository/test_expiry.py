"""When records end, by the rules that sessions and the values of users share."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flask_gsession.repository.expiry import Expiry
from flask_gsession.repository.idle_spans import FixedSpan, Span
from flask_gsession.repository.records import SessionRecords
from flask_gsession.tokens import new_token, session_key
from flask_gsession.values.envelope import Envelope
from flask_gsession.values.payload import Body, BodyFormat, Join

NOW, SPAN, LIFE = 1_000_000, 5_000, 60_000
KEY = session_key(new_token())
ENDS = st.lists(st.integers(0, NOW + 2 * LIFE), max_size=3)


@given(ENDS, ENDS, st.booleans())
def test_a_record_outlives_its_joins_but_not_its_absolute_end(
    first: list[int], then: list[int], renew: bool
) -> None:
    """A join that is forgotten too early could be applied a second time."""
    expiry = Expiry(lambda: NOW / 1000, FixedSpan(Span(SPAN, 100)), LIFE)
    records = SessionRecords(BodyFormat(9999, 9), Envelope(None), expiry, lambda: ("", KEY))

    def body(ends: list[int]) -> Body:
        return Body({}, joins=tuple(Join(b"id", 1, ends_at=end) for end in ends))

    record = records.draft_new(body(first))[1]
    last = NOW + LIFE
    assert record.absolute_expires_at == last
    assert record.idle_expires_at == min(max(NOW + SPAN, *first, 0), last)
    after = records.draft_next(record, body(then), renew=renew)
    assert after.idle_expires_at == min(max(record.idle_expires_at, *then, 0), last)
    assert expiry.end_of_blobs(body(then), last) > min(max(NOW + SPAN, *then, 0), last)
