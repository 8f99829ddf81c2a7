"""``moe-gpt serve`` as a process: it starts, stops at a signal after what runs, and says what is wrong in a line."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import httpx
import pytest
from serving.served import make_model, make_tokenizer

from moe_gpt.interop import hugging_face


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Hugging Face folder of a small model."""
    tokenizer = make_tokenizer()
    path = tmp_path_factory.mktemp("served") / "little"
    hugging_face.save(make_model(tokenizer.vocab_size), path, tokenizer)
    return path


@pytest.fixture
def server(folder) -> Iterator[tuple[subprocess.Popen, str]]:
    """The process and its address."""
    command = [sys.executable, "-m", "moe_gpt", "serve", str(folder), "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        line = next(line for line in process.stderr if line.startswith("serving"))
        yield process, re.search(r"http://[^\s;]+", line)[0]
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_sigterm_lets_the_running_request_end(server):
    """It gets its whole answer, later ones are refused, and the process ends by the signal."""
    process, url = server
    body = {"model": "little", "prompt": "a", "max_tokens": 240, "temperature": 0, "n": 4}
    found: list[httpx.Response] = []
    running = threading.Thread(target=lambda: found.append(httpx.post(f"{url}/v1/completions", json=body, timeout=60)))
    running.start()
    while "moe_gpt_requests_running 4.0" not in httpx.get(f"{url}/metrics").text:
        pass
    process.send_signal(signal.SIGTERM)
    running.join()
    assert found[0].status_code == 200
    assert found[0].json()["usage"]["completion_tokens"] == 4 * 240
    assert process.wait(timeout=20) in (0, -signal.SIGTERM)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")


@pytest.mark.slow
def test_a_port_that_is_taken_is_one_line(folder):
    """With the address, and status 2."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        command = [sys.executable, "-m", "moe_gpt", "serve", str(folder), "--port", str(port)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert f"--port {port}: cannot listen there" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_client_that_stalls_does_not_keep_the_server(server):
    """A half-sent body: a second signal ends the process at once, with a line for each signal."""
    process, url = server
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n{")
        httpx.get(f"{url}/health")
        process.send_signal(signal.SIGTERM)
        assert "finishing 0 answers" in next(process.stderr)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == -signal.SIGTERM


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--api-key", ""], "--api-key must be letters"),
        (["--api-key", "clé"], "--api-key must be letters"),
        (["--rows", "1000000000"], "--rows 1000000000: no memory"),
        (["--guesses", "3"], "--guesses 3 needs --lookup or --draft"),
        (["--name", ""], "--name must not be empty"),
    ],
)
def test_options_that_cannot_be_obeyed_are_a_line(folder, options, message):
    """And status 2."""
    command = [sys.executable, "-m", "moe_gpt", "serve", str(folder), "--port", "0", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
