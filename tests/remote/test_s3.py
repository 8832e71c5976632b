"""Packs and checkpoints on S3, which moto's server plays in this process."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import hrm
from hrm.cli import main
from hrm.data.published import local_pack
from hrm.errors import UserError
from tests.helpers.entry_points import TINY_RUN, Outcome, evaluated, make_pack, run_script, train
from tests.helpers.s3 import S3Server, forget_connections, s3_server

PACK = "s3://team/packs/boards"


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built") / "boards"
    make_pack(folder)
    return folder


@pytest.fixture(scope="module")
def s3(pack: Path) -> Iterator[S3Server]:
    """A server with a bucket, in which the pack is published."""
    with s3_server() as server:
        server.make_bucket("team")
        assert main(["data", "publish", str(pack), PACK, "licence=MIT"]) == 0
        yield server


@pytest.fixture(autouse=True)
def cache(s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HRM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def data(capsys: pytest.CaptureFixture[str], *argv: str) -> Outcome:
    capsys.readouterr()
    status = main(["data", *argv])
    return Outcome(status, *capsys.readouterr())


def contents(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_published_pack(s3: S3Server, pack: Path) -> None:
    assert contents(local_pack(PACK)) == contents(local_pack(f"{PACK}/1")) == contents(pack)
    assert sorted(s3.keys("team"))[:2] == ["packs/boards/1/identifiers.json", "packs/boards/1/manifest.json"]


def test_train_evaluate_and_resume(s3: S3Server, pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = [*TINY_RUN, f"data_path={PACK}", "epochs=1"]  # of 3 steps
    train(*options, "checkpoint_path=run")
    s3.put_folder(Path("run"), "s3://team/runs/first")
    ours, _ = evaluated("checkpoint=run", f"data_path={pack}")
    theirs, out = evaluated("checkpoint=s3://team/runs/first", "save_outputs=[logits]")  # on the pack that it names
    assert theirs == ours
    assert f"on {PACK}/test" in out
    assert Path("outputs/team/runs/first/step_3_all_preds.0").is_file()

    hrm.from_pretrained("s3://team/runs/first/step_3.safetensors", device="cpu").save_pretrained("saved")
    assert json.loads(Path("saved/config.json").read_text())["data_path"] == PACK
    s3.put_folder(Path("saved"), "s3://team/models/first")
    theirs, _ = evaluated("checkpoint=s3://team/models/first", f"data_path={PACK}/1")
    assert theirs == ours
    train(*options, "checkpoint_path=more", "init_from=s3://team/models/first")

    refused = run_script("pretrain.py", *options, "resume=s3://team/runs/first")
    assert (refused.status, "name it, by checkpoint_path=" in refused.err) == (2, True)
    options += ["epochs=2", "resume_changed=true", "checkpoint_path=resumed"]
    resumed = run_script("pretrain.py", *options, "resume=s3://team/runs/first")
    assert resumed.status == 0, resumed.err
    assert re.search(r"^Going on from \S+/state_3, with", resumed.out, re.MULTILINE)
    assert Path("resumed/step_6").is_file()


def test_a_bucket_that_is_not_there(capsys: pytest.CaptureFixture[str], pack: Path) -> None:
    with pytest.raises(UserError, match=r"s3://none/packs does not exist \(The specified bucket does not exist\)"):
        local_pack("s3://none/packs")
    with pytest.raises(UserError, match=r"s3://none/run does not exist \(The specified bucket does not exist\)"):
        hrm.from_pretrained("s3://none/run")
    done = data(capsys, "publish", str(pack), "s3://none/packs")
    assert done.status == 2
    assert "does not exist (The specified bucket does not exist): correct the URL." in done.err


def test_credentials(
    s3: S3Server, pack: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with s3.checking_credentials():
        with pytest.raises(UserError, match=r"may not be read .*: check the credentials \(AWS_ACCESS_KEY_ID"):
            local_pack(PACK)
        done = data(capsys, "publish", str(pack), f"{PACK}-2")
        assert done.status == 2
        assert re.search(r"s3://team/packs/boards-2\S* may not be \w+ .*: check the credentials", done.err)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    forget_connections()
    with pytest.raises(UserError, match=r"\(Unable to locate credentials\): check the credentials"):
        local_pack(PACK)
    monkeypatch.undo()
    forget_connections()


def test_without_network_the_copy_serves(
    pack: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import s3fs

    copy = local_pack(PACK)
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # where nothing listens
    forget_connections()
    try:
        assert local_pack(PACK) == copy
        assert "Could not connect" in (err := capsys.readouterr().err)
        assert "The copy in the cache is used" in err
        with pytest.raises(UserError, match=r"Could not connect .*: check the network"):
            local_pack(f"{PACK}/1")
        with pytest.raises(UserError, match="check the network"):  # http:// comes with s3fs
            local_pack("http://127.0.0.1:9/pack")
    finally:
        monkeypatch.undo()
        forget_connections()


def test_what_was_changed_there_is_refused(s3: S3Server, pack: Path, tmp_path: Path) -> None:
    other = shutil.copytree(pack, tmp_path / "other")
    assert main(["data", "publish", str(other), "s3://team/packs/other"]) == 0
    content = bytearray((pack / "train/all__labels.npy").read_bytes())
    content[-1] ^= 1
    s3.put("s3://team/packs/other/1/train/all__labels.npy", bytes(content))
    with pytest.raises(UserError, match=r"s3://team/packs/other/1/train/all__labels\.npy is not what"):
        local_pack("s3://team/packs/other")
