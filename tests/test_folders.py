"""Models written whole or not at all: what is killed, full or forbidden leaves the version before."""

import errno
import os
import signal
import subprocess
import sys

import pytest
from safetensors import SafetensorError
from tiny import tiny_llama, tiny_tokenizer

from hf_blr.cli import main
from hf_blr.folders import beside, clear_stopped, replacing_folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def write(folder, content):
    with replacing_folder(folder) as new:
        (new / "config.json").write_text(content)
        (new / f"{content}.safetensors").write_text(content)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def test_a_folder_is_replaced_and_keeps_what_is_no_weight(tmp_path):
    out = tmp_path / "deep" / "out"
    write(out, "first")
    (out / "notes.txt").write_text("mine")
    write(out, "second")
    assert names(out) == ["config.json", "notes.txt", "second.safetensors"]
    assert (out / "config.json").read_text() == "second" and names(out.parent) == ["out"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("call", [None, 1, 2])
def test_what_stops_leaves_the_version_before(error, call, tmp_path, monkeypatch):
    """In the writing; when the old version makes room; when the new one takes it."""
    write(tmp_path / "out", "first")
    rename, calls = os.rename, []

    def stopping(*places):
        calls.append(places)
        if len(calls) == call:
            raise error
        rename(*places)

    monkeypatch.setattr(os, "rename", stopping)
    with pytest.raises(error), replacing_folder(tmp_path / "out") as new:
        (new / "config.json").write_text("second")
        if call is None:
            raise error
    assert names(tmp_path) == ["out"] and (tmp_path / "out" / "config.json").read_text() == "first"


def test_what_a_killed_process_left_is_cleared_by_the_next(tmp_path):
    out = tmp_path / "out"
    program = f"""
import pathlib, time
from hf_blr.folders import replacing_folder
with replacing_folder(pathlib.Path({str(out)!r})) as new:
    (new / "model.safetensors").write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""
    write(out, "first")
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "writing\n"
        # another process' work is left alone while it runs
        clear_stopped(out)
        assert len(names(tmp_path)) == 2
        process.send_signal(signal.SIGKILL)
    write(out, "second")
    assert names(tmp_path) == ["out"] and names(out) == ["config.json", "second.safetensors"]


def test_a_version_that_was_put_aside_by_a_killed_process_comes_back(tmp_path):
    write(tmp_path / "out", "first")
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    os.rename(tmp_path / "out", tmp_path / f"{beside(tmp_path / 'out')}{process.pid}-old")
    clear_stopped(tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == "first" and names(tmp_path) == ["out"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_disk_that_is_full_ends_in_one_line_and_keeps_the_model(error, dense, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    arguments = ["compress", dense, str(out), "--structure", "low_rank", "--ratio", "0.5", "--dataset", "none"]
    assert main(arguments) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    from transformers import PreTrainedModel

    def full(self, folder, **_):
        (folder / "model.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    capsys.readouterr()
    assert main([*arguments, "--overwrite"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert f"{out} cannot be written" in lines[-1] and "No space left" in lines[-1]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before and names(tmp_path) == ["out"]


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to the superuser")
def test_a_parent_that_cannot_be_written_is_refused_before_the_fit(dense, tmp_path, capsys):
    (tmp_path / "parent" / "out").mkdir(parents=True)
    (tmp_path / "parent").chmod(0o555)
    assert main(["compress", dense, str(tmp_path / "parent" / "out"), "--ratio", "0.5", "--dataset", "none"]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_mount_point_is_refused_before_the_fit(dense, capsys):
    assert main(["compress", dense, "/proc", "--ratio", "0.5", "--dataset", "none"]) == 2
    assert "/proc is a mount point" in capsys.readouterr().err
