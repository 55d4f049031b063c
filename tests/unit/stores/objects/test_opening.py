"""From a URL to a bucket: what may be written, what is said of the rest, and that no secret is said again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import millpond
from millpond.errors import InvalidInput, StoreError
from millpond.model.clock import ManualClock
from millpond.stores.objects.clouds import Cloud
from millpond.stores.objects.obstore_bucket import DELETE_WINDOW, ObstoreBucket
from millpond.stores.objects.opening import OPTIONS, Location, open_bucket, open_object_store, parse_location
from millpond.stores.objects.profile import credentials_of_profile

SECRET = "wJalrXUtnFEMIK7MDENG"
CLOCK = ManualClock()


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An environment without a cloud in it."""
    for name in (
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "AWS_PROFILE",
        "AWS_DEFAULT_PROFILE",
        "AWS_REGION",
        "AWS_DEFAULT_REGION",
        "AWS_WEB_IDENTITY_TOKEN_FILE",
        "AZURE_STORAGE_ACCOUNT_NAME",
        "GOOGLE_APPLICATION_CREDENTIALS",
        "AWS_ENDPOINT_URL_S3",
        "AWS_ENDPOINT_URL",
        "AWS_ENDPOINT",
        "GOOGLE_BASE_URL",
        "AZURE_STORAGE_ENDPOINT",
        "AZURE_ENDPOINT",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    return tmp_path


def test_a_url_is_read_in_full() -> None:
    assert parse_location("s3://bucket") == Location(cloud=Cloud.S3, scheme="s3", bucket="bucket", prefix="")
    assert parse_location("s3://bucket/").prefix == ""
    assert parse_location("gs://my.bucket_1/a/b-c/d=1/") == Location(
        cloud=Cloud.GOOGLE, scheme="gs", bucket="my.bucket_1", prefix="a/b-c/d=1"
    )
    assert parse_location(
        "s3://bucket/p?endpoint=https://s3.example.com:9000/&region=eu-central-1&virtual_hosted=true&timeout=2.5"
        "&retry_for=0&inline_limit=1024&profile=my%20own&anonymous=false&allow_http=true"
    ) == Location(
        cloud=Cloud.S3,
        scheme="s3",
        bucket="bucket",
        prefix="p",
        endpoint="https://s3.example.com:9000",
        region="eu-central-1",
        virtual_hosted=True,
        timeout=2.5,
        retry_for=0,
        inline_limit=1024,
        profile="my own",
        allow_http=True,
    )
    assert parse_location("az://container/p?account=name").account == "name"
    for host in ("127.0.0.1", "localhost", "[::1]", "127.1.2.3"):
        assert parse_location(f"s3://bucket/p?endpoint=http://{host}:9000").endpoint == f"http://{host}:9000"


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("s3:bucket/p", "names no bucket: write s3://bucket/prefix"),
        ("s3:///p", "names no bucket"),
        ("gs://", "names no bucket: write gs://bucket/prefix"),
        ("s3://Bucket/p", "'Bucket' is no bucket's name"),
        ("s3://b/p", "'b' is no bucket's name"),
        ("s3://bucket:9000/p", r"write \?endpoint= for a server of your own"),
        ("s3://bücket/p", "is no bucket's name"),
        ("s3://-bucket/p", "is no bucket's name"),
        ("s3://bucket//p", "part that is empty"),
        ("s3://bucket/a//b", "part that is empty"),
        ("s3://bucket/a/../b", r"or \.\."),
        ("s3://bucket/.", "part that is empty"),
        ("s3://bucket/a%20b", "other characters"),
        ("s3://bucket/a b", "other characters"),
        ("s3://bucket/ä", "other characters"),
        ("s3://bucket/" + "x" * 401, "401 characters; 400 are the most"),
        ("s3://bucket/p#x", "followed by a #"),
        ("s3://bucket/p#", "followed by a #"),
        ("s3://bucket/p?region", "not name=value"),
        ("s3://bucket/p?&", "not name=value"),
        ("s3://bucket/p?colour=red", "does not know, 'colour'; it knows allow_http, anonymous, endpoint"),
        ("gs://bucket/p?region=x", "does not know, 'region'"),
        ("s3://bucket/p?account=x", "does not know, 'account'"),
        ("s3://bucket/p?region=a&region=b", "the option region twice"),
        ("s3://bucket/p?region=", "region is to be letters"),
        ("s3://bucket/p?region=eu%20west", "region is to be letters"),
        ("s3://bucket/p?timeout=soon", "timeout is to be seconds, 0.05 to 600"),
        ("s3://bucket/p?timeout=0", "timeout is to be seconds"),
        ("s3://bucket/p?timeout=nan", "timeout is to be seconds"),
        ("s3://bucket/p?retry_for=-1", "retry_for is to be seconds, 0 to 3600"),
        ("s3://bucket/p?inline_limit=1.5", "inline_limit is to be bytes, 0 to 4194304"),
        ("s3://bucket/p?inline_limit=4194305", "inline_limit is to be bytes"),
        ("s3://bucket/p?inline_limit=%D9%A1", "inline_limit is to be bytes"),
        ("s3://bucket/p?anonymous=yes", "anonymous is to be true or false"),
        ("s3://bucket/p?endpoint=s3.example.com", "endpoint is to be https://host"),
        ("s3://bucket/p?endpoint=ftp://s3.example.com", "endpoint is to be https://host"),
        ("s3://bucket/p?endpoint=https://host:port", "endpoint is to be https://host"),
        ("s3://bucket/p?endpoint=https://", "endpoint is to be https://host"),
        ("s3://bucket/p?endpoint=https://host/%3Fa=b", "without a name, password or query"),
        ("s3://bucket/p?endpoint=http://s3.example.com", "in the clear: write https://, or add allow_http=true"),
        ("s3://bucket/p?endpoint=http://127.0.0.1.example.com", "in the clear"),
        ("s3://bucket/p?endpoint=http://s3.example.com&allow_http=false", "in the clear"),
        ("az://container/p", r"names no storage account: add \?account=name, or set AZURE_STORAGE_ACCOUNT_NAME"),
        (f"s3://AKIAX:{SECRET}@bucket/p", "leave credentials to the environment"),
        (f"s3://bucket/p?secret_access_key={SECRET}", "'secret_access_key'; .* Credentials come from the environment"),
        (f"s3://bucket/p?{SECRET * 3}=x", "does not know, one; it knows"),
        (f"s3://bucket/p?endpoint=https://user:{SECRET}@host", "without a name, password or query"),
        (f"s3://bucket/p?region={SECRET}/x", "region is to be"),
        (f"s3://[bucket/{SECRET}", "is not a URL"),
        (f"az://account:{SECRET}@container/p", "leave credentials to the environment"),
    ],
)
def test_what_cannot_be_right_is_refused_with_what_to_write(url: str, words: str) -> None:
    with pytest.raises(InvalidInput, match=words) as caught:
        parse_location(url)
    assert SECRET not in str(caught.value)
    with pytest.raises(InvalidInput) as again:
        millpond.connect(url)
    assert SECRET not in str(again.value)


def test_an_endpoint_of_the_environment_is_held_to_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9000/")
    assert parse_location("s3://bucket/p").identity == "s3://bucket/p at http://127.0.0.1:9000"
    assert parse_location("s3://bucket/p?endpoint=https://other").endpoint == "https://other"
    assert parse_location("gs://bucket/p").endpoint is None
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://s3.example.com")
    with pytest.raises(InvalidInput, match="in the clear"):
        parse_location("s3://bucket/p")
    assert parse_location("s3://bucket/p?allow_http=true").endpoint == "http://s3.example.com"
    monkeypatch.setenv("GOOGLE_BASE_URL", f"https://user:{SECRET}@host")
    with pytest.raises(InvalidInput, match="the environment's GOOGLE_BASE_URL is to be https://host") as caught:
        parse_location("gs://bucket/p")
    assert SECRET not in str(caught.value)


def test_every_option_is_in_the_guide() -> None:
    guide = (Path(__file__).parents[4] / "docs" / "guides" / "buckets.md").read_text()
    for options in OPTIONS.values():
        for name in options:
            assert f"`{name}`" in guide, name


def test_no_text_of_a_bucket_shows_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAX")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    location = parse_location("s3://bucket/p?endpoint=https://s3.example.com")
    bucket = open_bucket(location, clock=CLOCK)
    assert SECRET not in repr(bucket) + repr(location) + str(bucket)
    assert repr(bucket) == "ObstoreBucket('s3://bucket/p')"
    assert location.identity == "s3://bucket/p at https://s3.example.com"


def test_a_store_is_made_of_the_options() -> None:
    store = open_object_store("s3://bucket/p?inline_limit=100&timeout=20", clock=CLOCK)
    assert (store.capabilities.name, store.capabilities.inline_limit) == ("s3", 100)
    assert store._engine.options.margin >= (20 + DELETE_WINDOW) * 1000  # type: ignore[attr-defined]
    pond = millpond.connect("gs://bucket/p")
    assert pond.store.capabilities.name == "gs"


def test_without_the_package_the_command_is_named() -> None:
    script = """
import sys
sys.modules["obstore"] = None
import millpond
for url in ("s3://bucket/p", "gs://bucket/p", "az://container/p?account=name"):
    try:
        millpond.connect(url)
    except millpond.StoreError as error:
        print(error)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.stdout.splitlines() == [
        "s3:// needs the package obstore: pip install 'millpond[s3]'",
        "gs:// needs the package obstore: pip install 'millpond[gcs]'",
        "az:// needs the package obstore: pip install 'millpond[azure]'",
    ], run.stderr


async def test_missing_credentials_are_told_with_where_they_belong(monkeypatch: pytest.MonkeyPatch) -> None:
    # The machine's role is asked for at an address where nobody answers.
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:1")
    bucket = open_bucket(parse_location("s3://bucket/p?endpoint=http://127.0.0.1:9&retry_for=0"), clock=CLOCK)
    with pytest.raises(StoreError, match=r"no valid credentials .*set AWS_ACCESS_KEY_ID") as caught:
        await bucket.read("a")
    assert type(caught.value) is StoreError


def _config(folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / name).write_text(text)


def _provided(bucket: ObstoreBucket) -> dict[str, Any]:
    return bucket._clients.small.credential_provider()  # type: ignore[union-attr, call-arg, return-value]


def test_keys_come_from_a_profile(nobody: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _config(
        nobody,
        credentials="[default]\naws_access_key_id = A\naws_secret_access_key = S%1\n"
        "[other]\naws_access_key_id = B\naws_secret_access_key = T\naws_session_token = U\n",
        config="[default]\nregion = eu-west-1\n[profile other]\nregion = eu-west-2\n"
        "[profile third]\naws_access_key_id = C\naws_secret_access_key = V\n",
    )
    chosen = _provided(open_bucket(parse_location("s3://bucket/p"), clock=CLOCK))
    assert (chosen["access_key_id"], chosen["secret_access_key"], chosen["token"]) == ("A", "S%1", None)
    found = credentials_of_profile(None, clock=CLOCK)
    assert found is not None
    assert found.region == "eu-west-1"
    assert "S%1" not in repr(found)
    monkeypatch.setenv("AWS_PROFILE", "other")
    chosen = _provided(open_bucket(parse_location("s3://bucket/p"), clock=CLOCK))
    assert (chosen["access_key_id"], chosen["secret_access_key"], chosen["token"]) == ("B", "T", "U")
    assert chosen["expires_at"].timestamp() == CLOCK.now_ms() / 1000 + 300
    named = open_bucket(parse_location("s3://bucket/p?profile=third"), clock=CLOCK)
    assert _provided(named)["access_key_id"] == "C"
    _config(nobody, config="[profile third]\naws_access_key_id = D\naws_secret_access_key = V\n")
    assert _provided(named)["access_key_id"] == "D", "what other tools write there is read"
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "E")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "F")
    assert open_bucket(parse_location("s3://bucket/p"), clock=CLOCK)._clients.small.credential_provider is None  # type: ignore[union-attr]


def test_profiles_that_cannot_be_used_say_why(nobody: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert credentials_of_profile(None, clock=CLOCK) is None
    with pytest.raises(InvalidInput, match="no AWS profile 'none'"):
        credentials_of_profile("none", clock=CLOCK)
    _config(nobody, config="[profile sso]\nsso_session = corp\n[profile bare]\nregion = x\n[default]\nregion = y\n")
    assert credentials_of_profile(None, clock=CLOCK) is None
    with pytest.raises(StoreError, match=r"gets its keys by sso_session.*export-credentials --profile sso"):
        credentials_of_profile("sso", clock=CLOCK)
    with pytest.raises(StoreError, match="has no keys"):
        credentials_of_profile("bare", clock=CLOCK)
    _config(nobody, credentials=f"{SECRET}\n")
    with pytest.raises(StoreError, match="not in the form") as caught:
        credentials_of_profile("bare", clock=CLOCK)
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None
