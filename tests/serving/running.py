"""Models and servers that the tests of serving share."""

import asyncio
import contextlib
import threading


INSTRUCTION = "pick up the red block"


def random_weights(config):
    """A model whose answers differ between images, instructions and drafts."""
    import torch

    from openvla_hf import OpenVLAForActionPrediction

    torch.manual_seed(0)
    model = OpenVLAForActionPrediction(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model


@contextlib.contextmanager
def running_server(app, port=0):
    """Serve an application on a port of the loopback interface, free by default, in a thread, and give its URL."""
    import uvicorn

    from openvla_hf.serving.connection import Connection

    class Server(uvicorn.Server):
        """A server that ends at once, where uvicorn's looks ten times a second whether to end."""

        async def main_loop(self):
            await self.on_tick(0)  # sets the date of the answers
            await asyncio.to_thread(ending.wait)

    ending = threading.Event()
    server = Server(uvicorn.Config(app, http=Connection, port=port, log_level="warning", lifespan="on"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise RuntimeError("The server did not start.")
        thread.join(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        ending.set()
        thread.join(30)
        assert not thread.is_alive()
