import pytest
import torch

from openvla_hf.modeling.modeling_openvla import OpenVLAForActionPrediction
from openvla_hf.testing import tiny_config, tiny_processor, tiny_tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A plain policy with its processor, from which a run can start."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = tiny_tokenizer()
    config = tiny_config(tokenizer)
    torch.manual_seed(0)
    OpenVLAForActionPrediction(config).save_pretrained(folder)
    tiny_processor(tokenizer, config).save_pretrained(folder)
    return folder
