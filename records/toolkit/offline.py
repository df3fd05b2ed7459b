"""Run a Python script as __main__ in this process without a network: python offline.py SCRIPT
[ARGUMENT ...]

Used where the system offers no network namespace. It refuses sockets to other machines, no more:
code that means harm can undo it, so that a stranger's folder wants a machine that may be lost.
"""

import runpy
import socket
import sys


def refuse(*what, **more):
    raise OSError("no network: this process runs without one")


class LocalSocket(socket.socket):
    """A socket that reaches this machine only: ranks of one run may still talk to each other."""

    def connect(self, address):
        if self.family != socket.AF_UNIX and str(address[0]) not in (
            "127.0.0.1",
            "::1",
            "localhost",
        ):
            refuse()
        super().connect(address)

    connect_ex = connect


def main():
    """Take the network away, then run the script named first."""
    socket.socket, lookup = LocalSocket, socket.getaddrinfo
    socket.getaddrinfo = lambda host, *rest, **more: (
        lookup(host, *rest, **more)
        if host in (None, "", "localhost", "127.0.0.1", "::1", socket.gethostname())
        else refuse()
    )
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
