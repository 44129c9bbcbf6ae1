"""The messages of `gsession.proto`: generated from it, exact for errors, strict about fields."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2
from grpc_tools import protoc

import flask_gsession
from flask_gsession import errors
from flask_gsession.errors import (
    CutOff,
    Gone,
    KeyTaken,
    LeaseLost,
    LogoutUnconfirmed,
    QueueFull,
    Stale,
    StoreError,
    StoreUnavailable,
    UnreadableRecord,
)
from flask_gsession.protocol import gsession_pb2 as pb
from flask_gsession.protocol.errors import ERROR_KEY, error_in, status_of
from flask_gsession.protocol.messages import to_message, to_record
from flask_gsession.protocol.methods import is_understood, methods_of
from flask_gsession.testing import a_pointer, a_record

TOP = Path(flask_gsession.__file__).parents[1]
PROTO = "flask_gsession/protocol/gsession.proto"


def test_the_generated_code_is_of_this_proto(tmp_path: Path) -> None:
    """Else run `make protocol`. The version of the compiler makes no difference."""
    described = tmp_path / "described"
    arguments = ["protoc", f"-I{TOP}", f"--descriptor_set_out={described}", PROTO]
    assert protoc.main(arguments) == 0
    (file,) = descriptor_pb2.FileDescriptorSet.FromString(described.read_bytes()).file
    committed = descriptor_pb2.FileDescriptorProto.FromString(pb.DESCRIPTOR.serialized_pb)
    assert _without_json_names(file) == _without_json_names(committed)


def _without_json_names(file: Any) -> Any:
    """The compiler derives them from the names, in one of the two forms only."""

    def strip(message: Any) -> None:
        for field in message.field:
            field.ClearField("json_name")
        for nested in message.nested_type:
            strip(nested)

    for message in file.message_type:
        strip(message)
    return file


def test_the_stub_for_type_checkers_names_every_message() -> None:
    stub = (TOP / PROTO).with_name("gsession_pb2.pyi").read_text()
    for name in pb.DESCRIPTOR.message_types_by_name:
        assert f"class {name}(" in stub
        for field in pb.DESCRIPTOR.message_types_by_name[name].fields:
            assert f"    {field.name}: " in stub, f"{name}.{field.name}"


def test_every_call_has_its_messages() -> None:
    calls = methods_of("Store") | methods_of("Values")
    for name, method in calls.items():
        assert method.path.endswith(f"/{name}")
        assert method.request.DESCRIPTOR.name.endswith("Request")


def test_a_record_comes_back_as_it_was() -> None:
    record = a_record(time.time)
    for each in (record, a_pointer(record, a_record(time.time))):
        assert to_record(pb.Record.FromString(to_message(each).SerializeToString())) == each


def test_an_impossible_time_makes_a_record_unreadable() -> None:
    record = a_record(time.time)._replace(created_at=2**70)
    with pytest.raises(UnreadableRecord, match="corrupt"):
        to_message(record)


# Errors -----------------------------------------------------------------------------------------

ERRORS: list[StoreError] = [
    KeyTaken(),
    Gone(),
    Stale(),
    LeaseLost(),
    QueueFull(),
    CutOff("signing in needs the centre", 7),
    UnreadableRecord("newer format", "version 9"),
    UnreadableRecord("unknown encryption key"),
    StoreUnavailable("redis: load: refused", 7),
    StoreUnavailable("sqlite: busy", contention=True),
    LogoutUnconfirmed("1 of 2 replicas"),
]


def sent(error: StoreError) -> StoreError | None:
    _, _, message = status_of(error)
    return error_in([("other", "x"), (ERROR_KEY, message.SerializeToString())])


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_an_error_comes_back_as_it_was(error: StoreError) -> None:
    back = sent(error)
    assert type(back) is type(error)
    assert str(back) == str(error)
    for name in ("reason", "detail", "contention", "retry_after"):
        assert getattr(back, name, None) == getattr(error, name, None)


def test_every_error_of_a_store_has_a_status_of_its_own() -> None:
    kinds = {
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type)
        and issubclass(kind, StoreError)
        and kind is not StoreError
        # Errors about users are raised above the stores.
        and kind
        not in (errors.RevocationUnfinished, errors.RosterUnreadable, errors.UserValuesUnreadable)
    }
    assert kinds == {type(error) for error in ERRORS}
    codes = {type(error): status_of(error)[0] for error in ERRORS}
    del codes[LogoutUnconfirmed], codes[CutOff]  # which are unavailable, too
    assert len(set(codes.values())) == len(codes)


def test_an_open_breaker_of_the_remote_store_is_not_a_server_failure() -> None:
    back = sent(StoreUnavailable("not asked", asked=False))
    assert isinstance(back, StoreUnavailable)
    assert back.contention


def test_a_kind_of_error_that_nobody_knows_is_an_outage() -> None:
    class Odd(StoreError):
        pass

    back = sent(Odd("what"))
    assert type(back) is StoreUnavailable
    assert str(back) == "Odd: what"
    assert error_in([(ERROR_KEY, pb.Error(kind="Future").SerializeToString())]) is None
    assert error_in([(ERROR_KEY, b"\xff\xff")]) is None
    assert error_in(None) is None


def test_a_field_that_is_not_known_is_not_ignored() -> None:
    request = pb.SaveRequest(record=to_message(a_record(time.time)), expected_version=1)
    raw = request.SerializeToString()
    assert is_understood(pb.SaveRequest.FromString(raw))
    newer = raw + b"\xf8\x07\x01"  # field 127 is 1
    assert not is_understood(pb.SaveRequest.FromString(newer))
    inner = request.record.SerializeToString() + b"\xf8\x07\x01"
    nested = pb.SaveRequest.FromString(
        b"\x0a" + bytes([len(inner) % 128 | 128, len(inner) // 128]) + inner
    )
    assert not is_understood(nested)


def test_each_error_has_its_grpc_code() -> None:
    assert status_of(Gone())[0] is grpc.StatusCode.NOT_FOUND
