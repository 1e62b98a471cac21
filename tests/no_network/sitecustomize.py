"""Refuses every network address but this machine's own, in each Python process that finds this folder on its path.

tests/conftest.py runs it for the tests themselves and puts the folder on PYTHONPATH for the processes they start. Only
sockets that Python opens are seen; `.ci/without_network` takes the network from everything else too.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
import sys
from typing import Any

NAMES = {None, "", "localhost", socket.gethostname()}


def is_own(host: Any) -> bool:
    """Whether an address or a name is this machine's, as it is known without asking a name server."""
    if isinstance(host, bytes):
        host = host.decode()
    if host in NAMES:
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def refuse(event: str, arguments: tuple[Any, ...]) -> None:
    match event:
        case "socket.connect" | "socket.sendto" | "socket.sendmsg":
            address = arguments[1]
            if not isinstance(address, tuple):  # a Unix socket, or one that is connected already
                return
            host = address[0]
        case "socket.getaddrinfo" | "socket.gethostbyname":
            host = arguments[0]
        case _:
            return
    if not is_own(host):
        # What a machine without a network says, so that code which can do without goes on.
        raise OSError(errno.ENETUNREACH, f"tests have no network, and this process wants {host!r} ({event})")


sys.addaudithook(refuse)
