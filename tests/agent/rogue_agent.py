"""An agent that registers pools and misbehaves on the first load, as its second argument says.

`hang_up` closes the connection, `garbage` sends bytes that are not a message, `half` sends half a
message. In each case it keeps writing to the pool forever.
"""

import mmap
import socket
import sys
import time
from pathlib import Path

import msgspec

from memkv_sglang.agent import protocol
from memkv_sglang.agent.lifetime import Lifetime
from memkv_sglang.agent.listener import Listener
from memkv_sglang.agent.wire import Channel, encode_frame

LIFETIME = Lifetime()


def main(path: str, manner: str) -> None:
    listener = Listener(Path(path), locked=False)
    listener.socket.setblocking(True)
    pools: list[mmap.mmap] = []
    decoder = msgspec.msgpack.Decoder(protocol.Request)
    kept = []
    while True:
        sock, _ = listener.socket.accept()
        channel: Channel[protocol.Request] = Channel(sock, decoder)
        kept.append(channel)
        if serve(channel, pools):
            break
    if manner == "hang_up":
        sock.shutdown(socket.SHUT_RDWR)
    else:
        sock.sendall(b"\x01\x00\x00\x00\xc1" if manner == "garbage" else b"\x09\x00")
    value = 0
    while True:
        value = value % 255 + 1
        for pool in pools:
            pool[:] = bytes([value]) * len(pool)
        time.sleep(0)


def serve(channel: Channel[protocol.Request], pools: list[mmap.mmap]) -> bool:
    """Serve until the client is silent for a moment; return whether it asked for a load."""
    while True:
        try:
            request = channel.receive(time.monotonic() + 0.1)
        except TimeoutError:
            return False
        match request:
            case protocol.Hello():
                welcome = protocol.Welcome(protocol.PROTOCOL_VERSION, b"t" * 16)
                channel.send(encode_frame(welcome), [LIFETIME.descriptor])
                continue
            case protocol.RegisterPool(length=length):
                pools.append(mmap.mmap(channel.claim_descriptors()[0], length))
                reply: object = protocol.Done()
            case protocol.SpillPages(buffers=buffers):
                reply = protocol.SpilledPages(bytes(len(buffers)))
            case protocol.LoadPages():
                return True
            case _:
                reply = protocol.Refused("no")
        channel.send(encode_frame(reply))


if __name__ == "__main__":
    main(*sys.argv[1:])
