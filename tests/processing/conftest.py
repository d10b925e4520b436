import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from openvla_hf.processing import OpenVLAImageProcessor, OpenVLAProcessor


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<unk>", "<s>", "</s>", "<PAD>", "In:", "What", "action", "should", "the", "robot", "take", "to"]
    words += ["pick", "up", "red", "block", "open", "drawer", "Out:", "Red", "?"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("?", "isolated")]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<PAD>",
        model_max_length=2048,
    )


@pytest.fixture
def processor(tokenizer: PreTrainedTokenizerFast) -> OpenVLAProcessor:
    return OpenVLAProcessor(OpenVLAImageProcessor(), tokenizer)


@pytest.fixture
def images() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    sizes = [(224, 224, 3), (48, 64, 3), (60, 31, 3)]
    return [Image.fromarray(rng.integers(0, 256, size, np.uint8)) for size in sizes]
