"""Large values in a bucket of S3, by its protocol, over HTTP."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import fsspec
import pytest

from flask_gsession.errors import Gone
from flask_gsession.events import LargeValueLost
from flask_gsession.stores import Store, StoreOptions
from flask_gsession.stores.base import Clock
from flask_gsession.stores.files import FRAME_BYTES, ORPHANS, FileBlobs
from flask_gsession.stores.memory import MemoryStore
from flask_gsession.testing import FakeClock, StoreContract, a_blob
from tests.harness.apps import Site, SiteMaker
from tests.harness.servers import S3Server
from tests.stores.test_large_files import Both, place
from tests.values.test_large_values import (
    ENDS,
    PHOTO,
    ROWS,
    get,
    memory_of_streaming,
    put,
    with_rows,
)

GUIDE = (Path(__file__).parents[2] / "docs/how-to/buckets.md").read_text()
MEGABYTE = 1024 * 1024


def forget_clients() -> None:
    """Let the next calls make clients of their own, with the credentials of that time."""
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with S3Server() as server:
        yield server


@pytest.fixture(autouse=True)
def _environment(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Set the variables that the guide names."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.url)
    monkeypatch.setenv("AWS_DEFAULT_REGION", server.region)
    sign_in(monkeypatch, ("tests", "tests"))
    match = re.search(r"FSSPEC_S3='(.*)'", GUIDE)
    assert match is not None
    monkeypatch.setitem(fsspec.config.conf, "s3", json.loads(match[1]))
    yield
    forget_clients()


def sign_in(monkeypatch: pytest.MonkeyPatch, credentials: tuple[str, str]) -> None:
    """Use these credentials from now on."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", credentials[0])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", credentials[1])
    forget_clients()


@pytest.fixture
def admin(server: S3Server) -> Iterator[Any]:
    """A client with all rights."""
    with closing(server.client("s3")) as client:
        yield client


@pytest.fixture
def bucket(admin: Any) -> str:
    """The name of an empty bucket."""
    name = f"shop-{secrets.token_hex(6)}"
    admin.create_bucket(Bucket=name)
    return name


@pytest.fixture
def url(bucket: str) -> str:
    return f"s3://{bucket}/large"


@pytest.fixture
def site(make_site: SiteMaker, url: str) -> Site:
    """A site on each store in turn, with its large values in the bucket."""
    return make_site(spill_store=url)


@pytest.fixture
def one_site(clock: FakeClock, url: str) -> Iterator[Site]:
    """A site on one store, for behaviour that is the same on all."""
    with SiteMaker("memory://", "", clock) as make:
        yield make(spill_store=url)


@pytest.fixture
def objects(admin: Any, bucket: str) -> Callable[[], dict[str, int]]:
    """Lists the objects in the bucket with their sizes, except the marker."""

    def list_them() -> dict[str, int]:
        found = admin.list_objects_v2(Bucket=bucket).get("Contents", [])
        return {each["Key"]: each["Size"] for each in found if each["Key"] != "large/gsession"}

    return list_them


@pytest.fixture(scope="module")
def bucket_of_the_contract(server: S3Server) -> str:
    with closing(server.client("s3")) as client:
        client.create_bucket(Bucket="of-the-contract")
        client.put_object(Bucket="of-the-contract", Key="gsession")
    return "of-the-contract"


class TestContract(StoreContract):
    """The part of the contract on blobs."""

    @pytest.fixture(autouse=True)
    def _bucket(self, bucket_of_the_contract: str) -> None:
        """It is there, with its marker."""

    def open(self, clock: Clock) -> Store:
        options = StoreOptions(clock=clock)
        store: Any = MemoryStore(options)
        both: Any = Both(store, FileBlobs("s3://of-the-contract", store, options))
        return both  # type: ignore[no-any-return]  # it has the methods


Objects = Callable[[], dict[str, int]]


def test_they_live_and_end_with_their_session(
    site: Site, objects: Objects, clock: FakeClock
) -> None:
    visitor = with_rows(site, photo=PHOTO)
    first = objects()
    assert len(first) == 2
    assert sum(first.values()) > len(PHOTO)
    assert all(name.startswith("large/") for name in first)
    visitor.run(put(rows=ROWS[1:]))
    assert objects().keys() > first.keys()
    visitor.run(lambda session: session.rotate(grace=0))
    assert visitor.run(get()) == ROWS[1:]
    assert visitor.run(get("photo")) == PHOTO
    visitor.run(ENDS["a logout"])
    assert objects().keys() < first.keys()  # which a clean-up removes
    clock.advance(3700)
    assert place(site).tidy().seen == 1


def test_a_file_is_streamed_in_bounded_memory(clock: FakeClock, url: str, objects: Objects) -> None:
    size = 40 * MEGABYTE
    with SiteMaker("memory://", "", clock) as make:
        visitor = make(spill_store=url, max_value_bytes=size, max_total_bytes=2 * size).visitor()
        visitor.run(put(photo=PHOTO))  # the client is there
        assert memory_of_streaming(visitor, size) < 9 * FRAME_BYTES
        assert len(objects()) == 1 + 10
        visitor.run(ENDS["a logout"])
        assert objects() == {}


def test_a_blob_discarded_during_its_write_does_not_come_back(
    one_site: Site, objects: Objects, clock: FakeClock
) -> None:
    blobs, name, end = place(one_site), a_blob(), int(clock() * 1000) + 60_000
    blobs.write_frame(name, 0, b"first", end)
    blobs.discard_blobs([name], 0)
    with pytest.raises(Gone):
        blobs.write_frame(name, FRAME_BYTES, b"second", end)
    assert objects() == {}
    assert one_site.inside.blobs() == {}


def test_a_clean_up_removes_orphaned_values(
    one_site: Site, objects: Objects, clock: FakeClock
) -> None:
    visitor = with_rows(one_site)
    (used,) = objects()
    with_rows(one_site)  # this visitor never comes back
    for _ in range(3):
        clock.advance(3000)
        assert visitor.run(get("user")) == "ada"  # which renews, and writes no object
    assert len(objects()) == 2
    blobs = place(one_site)
    assert blobs.tidy(dry_run=True).found == {ORPHANS: 1}
    assert len(objects()) == 2
    assert [blobs.tidy().found[ORPHANS] for _ in range(2)] == [1, 0]
    assert list(objects()) == [used]
    assert visitor.run(get()) == ROWS


def test_one_that_is_lost_is_absent(
    one_site: Site, objects: Objects, admin: Any, bucket: str
) -> None:
    def shorten(name: str) -> None:
        body = admin.get_object(Bucket=bucket, Key=name)["Body"]
        with closing(body):
            admin.put_object(Bucket=bucket, Key=name, Body=body.read()[:-1])

    def remove(name: str) -> None:
        admin.delete_object(Bucket=bucket, Key=name)

    for spoil, reason in ((remove, "missing"), (shorten, "truncated")):
        visitor = with_rows(one_site)
        (name,) = objects()
        spoil(name)
        assert visitor.run(get()) is None
        assert visitor.run(get("user")) == "ada"
        assert one_site.happened(LargeValueLost)[-1].reason == reason
        visitor.run(ENDS["a logout"])
        remove(name)


def test_a_bucket_that_is_not_there_is_an_outage_and_is_not_made(
    clock: FakeClock, admin: Any, caplog: pytest.LogCaptureFixture
) -> None:
    name = f"not-there-{secrets.token_hex(6)}"
    with SiteMaker("memory://", "", clock) as make:
        site = make(spill_store=f"s3://{name}/large")
        response = site.visitor().ask(put(rows=ROWS))
    assert (response.status_code, response.headers["Retry-After"]) == (503, "1")
    assert "files: write: there is no such bucket" in caplog.text
    assert name not in {each["Name"] for each in admin.list_buckets()["Buckets"]}


def test_a_bucket_that_went_is_an_outage(
    one_site: Site, objects: Objects, admin: Any, bucket: str
) -> None:
    visitor = with_rows(one_site)
    place(one_site).tidy()  # which lists the files
    for name in (*objects(), "large/gsession"):
        admin.delete_object(Bucket=bucket, Key=name)
    admin.delete_bucket(Bucket=bucket)
    assert visitor.ask(get()).status_code == 503
    assert visitor.run(get("user")) == "ada"
    assert one_site.happened(LargeValueLost) == []
    assert visitor.ask(put(rows=ROWS[1:])).status_code == 503


def policy_of_the_guide(bucket: str) -> dict[str, Any]:
    match = re.search(r"```json\n(.*?)```", GUIDE, re.DOTALL)
    assert match is not None
    policy: dict[str, Any] = json.loads(match[1].replace("the-shops-bucket", bucket))
    return policy


def test_the_rights_of_the_guide_are_enough_and_needed(
    server: S3Server,
    one_site: Site,
    objects: Objects,
    bucket: str,
    clock: FakeClock,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    policy = policy_of_the_guide(bucket)
    full = server.new_user(json.dumps(policy))
    fewer = {}
    for right in ("s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:ListBucket"):
        less = policy_of_the_guide(bucket)
        for statement in less["Statement"]:
            statement["Action"] = [each for each in statement["Action"] if each != right]
        less["Statement"] = [each for each in less["Statement"] if each["Action"]]
        assert less != policy
        fewer[right] = server.new_user(json.dumps(less))
    with server.checking_rights():
        sign_in(monkeypatch, full)
        visitor = with_rows(one_site)
        visitor.run(put(rows=ROWS[1:]))
        assert visitor.run(get()) == ROWS[1:]
        gone = with_rows(one_site)
        gone.run(ENDS["a logout"])
        clock.advance(3700)
        visitor.run(get("user"))
        assert place(one_site).tidy().found == {ORPHANS: 1}

        for right, work in (
            ("s3:GetObject", get()),
            ("s3:PutObject", put(rows=ROWS[2:])),
        ):
            sign_in(monkeypatch, fewer[right])
            place(one_site)._begin()
            assert visitor.ask(work).status_code == 503, right
            assert "PermissionError" in caplog.text
            caplog.clear()
        sign_in(monkeypatch, fewer["s3:DeleteObject"])
        place(one_site)._begin()
        visitor.run(ENDS["a logout"])
        assert "files: remove: PermissionError" in caplog.text
    assert len(objects()) == 1


def test_wrong_credentials_are_an_outage(
    server: S3Server,
    one_site: Site,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    sign_in(monkeypatch, ("nobody", "secret"))
    with server.checking_rights():
        assert one_site.visitor().ask(put(rows=ROWS)).status_code == 503
    assert "files: write: PermissionError" in caplog.text
    assert "secret" not in caplog.text


def test_a_server_that_is_frozen_or_gone_is_an_outage(
    server: S3Server, one_site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reopen() -> None:
        forget_clients()
        place(one_site)._begin()

    visitor = with_rows(one_site)
    timeouts = fsspec.config.conf["s3"]["config_kwargs"]
    with monkeypatch.context() as patch, server.paused():
        patch.setitem(timeouts, "read_timeout", 0.2)
        reopen()
        assert visitor.ask(get()).status_code == 503
        assert visitor.run(get("user")) == "ada"
    reopen()
    assert visitor.run(get()) == ROWS
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    reopen()
    assert visitor.ask(get()).status_code == 503
    assert one_site.happened(LargeValueLost) == []
