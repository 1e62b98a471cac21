"""No test reaches a network: what tests/no_network refuses, here and in the processes that tests start."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request

import pytest

ELSEWHERE = "192.0.2.1"  # RFC 5737: an address of documentation, nobody's


def test_an_address_elsewhere_is_refused() -> None:
    with socket.socket() as client, pytest.raises(OSError, match=rf"tests have no network.*{ELSEWHERE}"):
        client.connect((ELSEWHERE, 80))
    with socket.socket(type=socket.SOCK_DGRAM) as client, pytest.raises(OSError, match="tests have no network"):
        client.sendto(b"hello", (ELSEWHERE, 53))


def test_a_name_is_not_looked_up() -> None:
    with pytest.raises(urllib.error.URLError, match=r"tests have no network.*example\.org"):
        urllib.request.urlopen("http://example.org/")
    with pytest.raises(OSError, match="tests have no network"):
        socket.gethostbyname("example.org")


def test_a_process_that_a_test_starts_is_refused_too() -> None:
    code = f"import socket; socket.create_connection(({ELSEWHERE!r}, 80))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("OSError: [Errno 101] tests have no network")


def test_this_machine_can_talk_to_itself() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        answer = threading.Thread(target=lambda: server.accept()[0].sendall(b"hello"))
        answer.start()
        with socket.create_connection(("localhost", server.getsockname()[1])) as client:
            assert client.recv(5) == b"hello"
        answer.join()
