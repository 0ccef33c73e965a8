"""The source archive is whole, and the wheel that is built from it works in an environment of its own."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: of the repository alone
LEFT_OUT = {".gitignore", ".ci/run"}

#: in the new environment: a model is compressed, saved and loaded, and a file that is no module is there
USE = """
import sys
from importlib.resources import files
import torch
from transformers import LlamaConfig, LlamaForCausalLM
import hf_blr
assert hf_blr.__file__.startswith(sys.prefix), hf_blr.__file__
assert any(file.name.endswith(".html.j2") for file in files("hf_blr.bench.report").iterdir())
sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 9}
model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
hf_blr.compress(model, hf_blr.BLRConfig("low_rank", ratio=0.5), progress=False)
model.save_pretrained(sys.argv[1])
ids = torch.arange(8)[None]
assert torch.equal(LlamaForCausalLM.from_pretrained(sys.argv[1])(ids).logits, model(ids).logits)
"""


def run(*command, **kw):
    # what this process is told to import must not stand in for what is installed
    own = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=own, **kw)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def build(kind, source, to):
    code = f"import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
    run(sys.executable, "-c", code, to, cwd=source)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """(the folder that the source archive unpacks to, the files that the repository has)"""
    if not (ROOT / ".git").exists():
        pytest.skip("what an archive should hold is what git knows, and there is no repository here")
    folder = tmp_path_factory.mktemp("archive")
    tracked = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\n")[:-1]
    # beside the repository, as building leaves things behind
    for name in tracked:
        (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / "tree" / name)
    build("sdist", folder / "tree", folder)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as packed:
        packed.extractall(folder / "unpacked", filter="data")
    return next((folder / "unpacked").iterdir()), set(tracked)


def test_the_source_archive_holds_every_file_of_the_repository(archive):
    unpacked, tracked = archive
    held = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    assert tracked - held == LEFT_OUT
    made = {name for name in held - tracked if ".egg-info/" not in name}
    assert made == {"PKG-INFO"}


def test_the_wheel_works_in_an_environment_of_its_own(archive, tmp_path):
    build("wheel", archive[0], tmp_path)
    wheel = next(tmp_path.glob("*.whl"))
    home = tmp_path / "environment"
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin" / "python"
    # its dependencies are this environment's; a line of such a file does not bring what others install in place
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", python, "install"]
    run(*pip, "--no-deps", "--no-index", "--disable-pip-version-check", wheel)
    run(python, "-c", USE, tmp_path / "model", cwd=tmp_path)
    assert "compress" in run(home / "bin" / "hf-blr", "--help", cwd=tmp_path)
