"""`transformers serve` with a compressed model, asked over HTTP."""

import json
import socket
import subprocess
import sys
import time
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest
import torch
from tiny import tiny_llama, tiny_tokenizer

import hf_blr
from hf_blr import BLRConfig

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

#: seconds in which a server is there on a busy machine
PATIENCE = 120


@pytest.fixture
def server(tmp_path):
    """(address, model in memory) of a server that runs."""
    model = tiny_llama()
    hf_blr.compress(model, BLRConfig("blast", ratio=0.5), progress=False)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve = ["transformers.cli.transformers", "serve", str(tmp_path), "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen([sys.executable, "-m", "hf_blr", "run", *serve, "--device", "cpu"])
    try:
        yield f"http://127.0.0.1:{port}", model, str(tmp_path), process
    finally:
        process.terminate()
        process.wait(timeout=PATIENCE)


def answer(address, process, body):
    """What the server answers, as soon as it is there."""
    request = Request(f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    end = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < end:
        try:
            with urlopen(request, timeout=PATIENCE) as response:
                return json.load(response)
        except URLError as error:
            if not isinstance(error.reason, ConnectionRefusedError):
                raise
            time.sleep(0.2)
    raise TimeoutError(f"no server at {address}")


@pytest.mark.slow
def test_a_server_answers_as_the_model_does(server):
    address, model, name, process = server
    body = {"model": name, "prompt": "A line", "max_tokens": 8, "temperature": 0}
    (choice,) = answer(address, process, body)["choices"]
    tokenizer = tiny_tokenizer()
    ids = tokenizer("A line", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    assert choice["text"] == tokenizer.decode(expected, skip_special_tokens=True)
