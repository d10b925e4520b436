"""Assemble a policy to train: vision towers, a language model and a new projector."""

import argparse

from .common import add_written_dtype, checkpoint, positive, print_written, writing_progress


EXAMPLE = """assemble vlm --dinov2 timm/vit_large_patch14_reg4_dinov2.lvd142m \\
      --siglip timm/vit_so400m_patch14_siglip_224.webli --language-model meta-llama/Llama-2-7b-hf
  openvla-hf assemble small --dinov2 facebook/dinov2-with-registers-small \\
      --siglip google/siglip-so400m-patch14-224 --language-model TinyLlama/TinyLlama-1.1B-Chat-v1.0"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("destination", help="new or empty folder")
    parser.add_argument("--dinov2", type=checkpoint, help="folder or Hub id of a DINOv2 with registers")
    parser.add_argument("--siglip", type=checkpoint, help="folder or Hub id of a SigLIP model")
    parser.add_argument(
        "--language-model", type=checkpoint, required=True, help="folder or Hub id of a Llama model with its tokenizer"
    )
    parser.add_argument(
        "--image-size",
        type=positive,
        default=224,
        help="pixels along a side of the policy's images (default: %(default)s)",
    )
    add_written_dtype(parser)


def run(args: argparse.Namespace) -> None:
    from ..checkpoints.assemble import assemble

    with writing_progress("Assembling", args) as on_progress:
        folder = assemble(
            args.destination,
            language_model=args.language_model,
            dinov2=args.dinov2,
            siglip=args.siglip,
            image_size=args.image_size,
            dtype=args.dtype,
            on_progress=on_progress,
        )
    print_written(folder, args)
