"""How much memory an action takes beside the weights, with full-size towers and a part of the language model's layers.

python benchmarks/memory.py --layers 2
"""

import argparse

from PIL import Image

from openvla_hf import OpenVLAConfig, OpenVLAForActionPrediction
from openvla_hf.evaluation.latency import INSTRUCTION, peak_memory
from openvla_hf.testing import BRIDGE_LIKE_STATS, tiny_processor, tiny_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=2, help="of the language model (default: %(default)s)")
    args = parser.parse_args()
    config = OpenVLAConfig(
        vision_backbone_id="dinosiglip-vit-so-224px",
        text_config={"max_position_embeddings": 2048, "num_hidden_layers": args.layers},
        norm_stats={"random": {"action": BRIDGE_LIKE_STATS}},
    )
    model = OpenVLAForActionPrediction(config).eval()
    processor = tiny_processor(tiny_tokenizer([INSTRUCTION], merges=500), config)
    inputs = processor(Image.new("RGB", (224, 224)), instruction=INSTRUCTION)
    held = peak_memory(lambda: model.predict_action(**inputs), model.device)
    print("Peak memory is not known on this system." if held is None else f"{held / 1e9:.2f} GB beside the weights")


if __name__ == "__main__":
    main()
