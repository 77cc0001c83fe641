"""A fake agent whose writes continue after it dies: a child does them and holds the agent's lock.

Prints the child's process id. With `unlocked`, the descriptor it sends carries no lock.
"""

import fcntl
import mmap
import os
import socket
import sys
import time
from pathlib import Path

import msgspec

from memkv_sglang.agent import protocol
from memkv_sglang.agent.listener import Listener
from memkv_sglang.agent.wire import Channel, encode_frame


def main(path: str, unlocked: bool) -> None:
    parent, child = socket.socketpair()
    lock = os.memfd_create("lock")
    lifetime = os.open(f"/proc/self/fd/{lock}", os.O_RDONLY)
    if not unlocked:
        fcntl.flock(lock, fcntl.LOCK_EX)
        writer = os.fork()
        if writer == 0:
            write(child)
        print(writer, flush=True)
    listener = Listener(Path(path), locked=False)
    listener.socket.setblocking(True)
    decoder = msgspec.msgpack.Decoder(protocol.Request)
    kept = []
    while True:
        sock, _ = listener.socket.accept()
        channel: Channel[protocol.Request] = Channel(sock, decoder)
        kept.append(channel)
        serve(channel, lifetime, parent)


def serve(channel: Channel[protocol.Request], lifetime: int, writer: socket.socket) -> None:
    """Answer until the client pauses; never answer a load or a spill."""
    while True:
        try:
            request = channel.receive(time.monotonic() + 0.1)
        except (TimeoutError, EOFError):
            return
        match request:
            case protocol.Hello():
                welcome = protocol.Welcome(protocol.PROTOCOL_VERSION, b"t" * 16)
                channel.send(encode_frame(welcome), [lifetime])
            case protocol.RegisterPool():
                descriptors = channel.claim_descriptors()
                socket.send_fds(writer, [b"x"], descriptors)
                os.close(descriptors[0])
                channel.send(encode_frame(protocol.Done()))
            case _:
                pass


def write(orders: socket.socket) -> None:
    """Write into the first pool received, forever."""
    _, descriptors, _, _ = socket.recv_fds(orders, 1, 1)
    memory = mmap.mmap(descriptors[0], 0)
    value = 0
    while True:
        value = value % 255 + 1
        memory[:] = bytes([value]) * len(memory)
        time.sleep(0)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:] == ["unlocked"])
