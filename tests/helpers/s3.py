"""An S3 server of moto's in this process, on a free loopback port."""

import logging
import os
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest


class S3Server:
    """A server, and what it holds."""

    def __init__(self, endpoint: str) -> None:
        import boto3

        self.endpoint = endpoint
        self._client: Any = boto3.client("s3")

    def make_bucket(self, name: str) -> None:
        self._client.create_bucket(Bucket=name)

    def put(self, url: str, content: bytes) -> None:
        bucket, _, key = url.removeprefix("s3://").partition("/")
        self._client.put_object(Bucket=bucket, Key=key, Body=content)

    def put_folder(self, folder: Path, url: str) -> None:
        """What `aws s3 cp --recursive` does."""
        for file in folder.rglob("*"):
            if file.is_file():
                self.put(f"{url}/{file.relative_to(folder).as_posix()}", file.read_bytes())

    def keys(self, bucket: str) -> list[str]:
        return [entry["Key"] for entry in self._client.list_objects_v2(Bucket=bucket).get("Contents", [])]

    @contextmanager
    def checking_credentials(self) -> Iterator[None]:
        """A context in which requests must be signed by a user that exists."""
        self._post("/moto-api/reset-auth", b"0")
        try:
            yield
        finally:
            self._post("/moto-api/reset-auth", b"inf")

    def _post(self, path: str, content: bytes) -> None:
        headers = {"Content-Type": "application/octet-stream"}  # else it is read as a form
        with urllib.request.urlopen(urllib.request.Request(self.endpoint + path, content, headers, method="POST")):
            pass


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """A context with a server, which the environment names; the test is skipped where packages are missing."""
    pytest.importorskip("s3fs", reason="s3:// needs s3fs, of the extra s3")
    server_module = pytest.importorskip("moto.server", reason="the S3 server of these tests is moto[server]")
    logging.getLogger("werkzeug").setLevel("ERROR")
    server = server_module.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    environment = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "somebody",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }
    try:
        with mock.patch.dict(os.environ, environment):
            os.environ.pop("AWS_PROFILE", None)
            forget_connections()
            yield S3Server(endpoint)
    finally:
        forget_connections()
        server.stop()


def forget_connections() -> None:
    """Let fsspec read the environment again."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
