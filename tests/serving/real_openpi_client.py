"""Act with PyPI's openpi-client on a server: URL, API key and a file of observations, in an environment of its own.

Prints what the client got as JSON.
"""

import json
import sys

import numpy as np
from openpi_client.action_chunk_broker import ActionChunkBroker
from openpi_client.websocket_client_policy import WebsocketClientPolicy


def main(url, api_key, path):
    with np.load(path) as file:
        observations = [
            {
                "observation/image": image,
                "observation/wrist_image": wrist,
                "observation/state": state,
                "prompt": str(file["prompt"]),
            }
            for image, wrist, state in zip(file["images"], file["wrists"], file["states"], strict=True)
        ]
    client = WebsocketClientPolicy(url.replace("http", "ws", 1), api_key=api_key)
    metadata = client.get_server_metadata()
    player = ActionChunkBroker(client, metadata["action_horizon"])
    played = [player.infer(one)["actions"].tolist() for one in observations for _ in range(metadata["action_horizon"])]
    try:
        client.infer({"prompt": "go"})
    except RuntimeError as error:
        print(json.dumps({"metadata": metadata, "played": played, "error": str(error)}))


main(*sys.argv[1:])
