"""Whether a server could listen on an address now."""

from __future__ import annotations

import errno
import socket


def port_reasons(host: str, port: int) -> list[str]:
    """Why uvicorn could not bind host:port now; empty if it could. Effect: binds it briefly."""
    if not 1 <= port <= 65535:
        return [f"--port must be 1 to 65535: got {port}. Choose a free port."]
    try:
        _bind(host, port)
    except (socket.gaierror, UnicodeError) as error:
        return [f"--host must be a name or address: got {host!r} ({error}). Correct it."]
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            free = _free_port(host, port)
            return [f"--port must be free on {host}: got {port}, in use. Try --port {free}."]
        got = f"{host}:{port} ({error.strerror})"
        return [f"--host and --port must be open to this process: got {got}. Choose others."]
    return []


def _bind(host: str, port: int) -> None:
    """Bind every address of a host for a moment, with the socket options that asyncio sets.

    Raises: OSError if an address cannot be bound; socket.gaierror if the host has none.
    """
    for family, kind, proto, _, address in socket.getaddrinfo(
        host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    ):
        try:
            listener = socket.socket(family, kind, proto)
        except OSError:  # this kernel lacks the address family; asyncio skips it too
            continue
        with listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind(address)


def _free_port(host: str, taken: int) -> int:
    """A free port near a taken one, to suggest."""
    for port in range(taken + 1, min(taken + 100, 65536)):
        try:
            _bind(host, port)
        except OSError:
            continue
        return port
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])
