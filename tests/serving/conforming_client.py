"""A client of openpi's protocol, written from its description alone: it knows nothing of the server's code."""

import msgpack
import numpy as np
from websockets.sync.client import connect


def encode(value):
    """Arrays and numpy scalars are maps with keys of bytes."""
    if isinstance(value, np.ndarray):
        return {
            b"__ndarray__": True,
            b"data": value.tobytes(),
            b"dtype": value.dtype.str,
            b"shape": value.shape,
        }
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    raise TypeError(type(value))


def decode(entries):
    if b"__ndarray__" in entries:
        return np.ndarray(entries[b"shape"], np.dtype(entries[b"dtype"]), entries[b"data"])
    if b"__npgeneric__" in entries:
        return np.dtype(entries[b"dtype"]).type(entries[b"data"])
    return entries


def pack(message):
    return msgpack.packb(message, default=encode)


class OpenpiClient:
    """Connects, reads the metadata, and asks for the actions of one observation after another."""

    def __init__(self, url, api_key=None):
        headers = {"Authorization": f"Api-Key {api_key}"} if api_key else None
        address = url.replace("http", "ws", 1)
        connecting = connect(address, compression=None, max_size=None, additional_headers=headers, proxy=None)
        self.socket = connecting.__enter__()
        self.metadata = self.receive()

    def get_server_metadata(self):
        return self.metadata

    def receive(self):
        reply = self.socket.recv()
        if isinstance(reply, str):
            raise RuntimeError(f"Error in inference server:\n{reply}")
        return msgpack.unpackb(reply, object_hook=decode)

    def infer(self, observation):
        self.socket.send(pack(observation))
        return self.receive()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.socket.close()


class ActionChunkBroker:
    """Plays the chunks of a client: a row of every array in a reply for each step."""

    def __init__(self, client, horizon):
        self.client, self.horizon = client, horizon
        self.step, self.reply = 0, None

    def infer(self, observation):
        if self.reply is None:
            self.step, self.reply = 0, self.client.infer(observation)
        step = {name: one[self.step] if isinstance(one, np.ndarray) else one for name, one in self.reply.items()}
        self.step += 1
        if self.step == self.horizon:
            self.reply = None
        return step

    def reset(self):
        self.step, self.reply = 0, None
