"""Models that write their reasoning before the action: a tiny one was taught three texts of different lengths."""

import numpy as np
import pytest
import torch
from reasoning_policy import LONGEST, TEXTS
from transformers import AutoModel, AutoProcessor

from openvla_hf.modeling.reasoning import find_action, lasting_part
from openvla_hf.processing.processing_openvla import REASONING_PROMPT, VICUNA_PROMPT
from openvla_hf.testing import tiny_config


@pytest.fixture
def predict(taught):
    """Return a function that predicts for some of the instructions, with details."""

    def run(*instructions, **options):
        inputs = taught.processor([taught.images[one] for one in instructions], instruction=list(instructions))
        options = {"unnorm_key": "bridge_orig", "tokenizer": taught.processor.tokenizer} | options
        return taught.model.predict_action(**inputs, return_details=True, **options)

    return run


# Texts and actions


@pytest.mark.parametrize("instruction", TEXTS)
def test_the_text_and_the_action_after_it_are_found(taught, predict, instruction):
    text, action = taught.lessons[instruction]
    details = predict(instruction)
    assert details.text == [TEXTS[instruction]]
    assert details.reasoning_ids == [text]
    assert details.token_ids.tolist() == [action]
    assert np.array_equal(details.actions[0], taught.model.decode_actions(action, "bridge_orig"))
    assert details.forward_passes == len(text) + len(action) + 1


def test_the_plain_call_returns_the_action(taught, predict):
    (instruction, *_) = TEXTS
    inputs = taught.processor(taught.images[instruction], instruction=instruction)
    action = taught.model.predict_action(**inputs, unnorm_key="bridge_orig")
    assert np.array_equal(action, predict(instruction).actions[0])
    details = taught.model.predict_action(**inputs, unnorm_key="bridge_orig", return_details=True)
    assert details.text is None
    assert details.reasoning_ids == [taught.lessons[instruction][0]]


def test_rows_of_a_batch_with_different_lengths_give_the_same_as_alone(predict):
    alone = [predict(instruction) for instruction in TEXTS]
    assert len({len(one.reasoning_ids[0]) for one in alone}) == 3
    for order in ([0, 1, 2], [2, 0, 1], [1, 1, 2]):
        names = list(TEXTS)
        batch = predict(*(names[index] for index in order), unnorm_key=["bridge_orig", "other", "bridge_orig"])
        for row, index in enumerate(order):
            assert batch.text[row] == alone[index].text[0]
            assert np.array_equal(batch.actions[row], alone[index].actions[0])
            assert np.allclose(batch.probabilities[row], alone[index].probabilities[0], atol=1e-4)


@torch.no_grad()
def test_the_ids_and_probabilities_are_those_of_greedy_passes_without_a_cache(taught, predict):
    model, processor = taught.model, taught.processor
    for instruction, (text, action) in taught.lessons.items():
        inputs = processor(taught.images[instruction], instruction=instruction)
        ids, rows = inputs["input_ids"], []
        for _ in range(len(text) + len(action)):
            logits = model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[0, -1]
            rows.append(logits)
            ids = torch.cat([ids, logits.argmax().view(1, 1)], dim=1)
        assert ids[0, inputs["input_ids"].shape[1] :].tolist() == text + action
        tokenizer = model.action_tokenizer
        expected = torch.stack(rows[-7:])[:, tokenizer.first_id : tokenizer.vocab_end].flip(-1).softmax(-1)
        assert np.allclose(predict(instruction).probabilities[0], expected, atol=1e-4)


def test_prompts_without_placeholders_and_with_padding_on_the_right_give_the_same(taught, predict):
    processor = taught.processor
    inputs = processor(list(taught.images.values()), instruction=list(TEXTS), add_image_tokens=False)
    rows = [row[mask.bool()] for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
    padded = torch.nn.utils.rnn.pad_sequence(rows, True, processor.tokenizer.pad_token_id)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], True)
    details = taught.model.predict_action(padded, inputs["pixel_values"], mask, "bridge_orig", return_details=True)
    assert details.reasoning_ids == predict(*TEXTS).reasoning_ids


def test_sampling_takes_the_arguments_of_generate(predict):
    torch.manual_seed(0)
    cold = predict(*TEXTS, do_sample=True, temperature=1e-4)
    assert cold.text == list(TEXTS.values())
    with pytest.raises(ValueError, match="`generate` rejected 'do_sample', 'temperature'"):
        predict(*TEXTS, do_sample=True, temperature=-1.0)


# Texts without an action


def test_a_text_that_is_cut_off_is_shown(taught, predict):
    with pytest.raises(
        ValueError, match=r"wrote 12 tokens without a whole action of 7 dim.* for observation 0\. The "
    ):
        predict(LONGEST, max_new_tokens=12)
    in_the_action = len(taught.lessons[LONGEST][0]) + 4
    with pytest.raises(ValueError, match=r"for observation 1\. The text ends in '.*\[3, 40\] ACTION:.*Raise `max_new"):
        predict("push", LONGEST, max_new_tokens=in_the_action)
    with pytest.raises(ValueError, match=r"Pass `tokenizer=processor\.tokenizer` to see the text"):
        predict(LONGEST, max_new_tokens=in_the_action, tokenizer=None)
    predict(LONGEST, max_new_tokens=len(taught.lessons[LONGEST][0]) + 7)  # all but the end


@pytest.mark.parametrize(
    ("ids", "start"),
    [
        ([1, 2, 101, 102, 103], 2),
        ([101, 102, 103], 0),
        ([101, 1, 100, 101, 102, 103], 3),  # stray ids before, and one too many: the last ones count
        ([1, 101, 102, 103, 2, 2], 1),
        ([1, 2, 101, 102], None),
        ([101, 1, 102, 103], None),  # cut off, with a stray id of the text
        ([101, 102, 103, 1, 101], None),
        ([104, 104, 104, 99], None),  # outside the range
        ([], None),
    ],
)
def test_the_action_is_the_last_whole_run_of_action_ids(ids, start):
    ids = np.array(ids, dtype=np.int64)
    if start is None:
        with pytest.raises(ValueError, match="without a whole action of 3 dimensions"):
            find_action(ids, 3, 100, 104)
    else:
        assert find_action(ids, 3, 100, 104) == start


def test_logits_that_are_not_finite_are_an_error(taught, tiny):
    model, processor = tiny()
    model.config.reasoning = True
    model.lm_head.weight.data.fill_(torch.nan)
    inputs = processor(taught.images["push"], instruction="push")
    with pytest.raises(ValueError, match="not finite for observation 0"):
        model.predict_action(**inputs, max_new_tokens=9)


def test_arguments_that_do_not_fit_a_text_are_refused(taught, predict):
    for name, value in {"draft_token_ids": [[1] * 7], "num_beams": 2, "num_return_sequences": 2}.items():
        with pytest.raises(ValueError, match=f"does not take `{name}`"):
            predict("push", **{name: value})
    with pytest.raises(ValueError, match=r"and 5000 new tokens exceed the 512 positions"):
        predict("push", max_new_tokens=5000)
    with pytest.raises(ValueError, match="Got `reasoning_ids` for 2 rows, but 1 observations: give a list of ids"):
        predict("push", reasoning_ids=[[3], [4]])
    for wrong in (-1, 10**6, taught.model.config.image_token_id):
        with pytest.raises(ValueError, match="`reasoning_ids` contains ids that are not text"):
            predict("push", reasoning_ids=[[wrong]])
    with pytest.raises(ValueError, match="compiled passes only decode"):
        taught.model.compile_for_actions()


# Reuse of the reasoning


def test_a_reused_text_gives_the_same_in_fewer_passes(taught, predict):
    whole = predict(*TEXTS)
    kept = [lasting_part(ids, taught.processor.tokenizer) for ids in whole.reasoning_ids]
    for text, ids in zip(TEXTS.values(), kept, strict=True):
        assert taught.processor.tokenizer.decode(ids) == text.partition(" MOVE REASONING:")[0]
    again = predict(*TEXTS, reasoning_ids=kept)
    assert (again.text, again.token_ids.tolist()) == (whole.text, whole.token_ids.tolist())
    assert again.forward_passes < whole.forward_passes - min(map(len, kept))
    some = predict(*TEXTS, reasoning_ids=[kept[0], [], kept[2]])
    assert (some.text, some.token_ids.tolist()) == (whole.text, whole.token_ids.tolist())


def test_the_lasting_part_ends_before_the_first_part_that_changes(taught):
    tokenizer = taught.processor.tokenizer

    def kept(text):
        return tokenizer.decode(lasting_part(tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer))

    assert kept(" push. PLAN: go. GRIPPER POSITION: [5, 6] ACTION:") == " push. PLAN: go."
    assert kept(" a é ü. MOVE REASONING: b. GRIPPER POSITION: [1, 2]") == " a é ü."
    assert kept(" push. PLAN: go. ACTION:") == ""
    assert lasting_part([], tokenizer) == []


def test_a_stream_writes_a_whole_text_at_every_third_step(taught, predict):
    processor, (text, _) = taught.processor, taught.lessons["push"]
    inputs = processor(taught.images["push"], instruction="push")
    stream = taught.model.action_stream("bridge_orig", reuse_reasoning=3, tokenizer=processor.tokenizer)
    kept = lasting_part(text, processor.tokenizer)
    whole, short = len(text) + 8, len(text) - len(kept) + 8
    expected, passes = predict("push").actions[0], []
    for _ in range(7):
        assert np.array_equal(stream.predict_action(**inputs), expected)
        passes.append(stream.forward_passes)
        assert stream.text == [TEXTS["push"]]
    assert passes == [whole, short, short, whole, short, short, whole]
    stream.reset()
    assert (stream.text, stream.reasoning_ids) == (None, [])
    assert stream.predict_action(**inputs, return_details=True).forward_passes == whole


def test_another_instruction_or_another_number_of_robots_starts_a_new_text(taught):
    processor = taught.processor
    stream = taught.model.action_stream("bridge_orig", reuse_reasoning=5, tokenizer=processor.tokenizer)
    for names in (["push"], [LONGEST], list(TEXTS), ["push", "push"]):
        inputs = processor([taught.images[name] for name in names], instruction=names)
        passes = []
        for _ in range(2):
            stream.predict_action(**inputs)
            assert stream.text == [TEXTS[name] for name in names]
            passes.append(stream.forward_passes)
        assert passes[0] == max(len(taught.lessons[name][0]) for name in names) + 8 > passes[1]


def test_a_stream_reuses_nothing_by_default(taught):
    inputs = taught.processor(taught.images["push"], instruction="push")
    stream = taught.model.action_stream("bridge_orig")
    passes = [stream.predict_action(**inputs, return_details=True).forward_passes for _ in range(2)]
    assert passes[0] == passes[1]
    for wrong in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="`reuse_reasoning` must be an integer of at least 1"):
            taught.model.action_stream("bridge_orig", reuse_reasoning=wrong, tokenizer=taught.processor.tokenizer)
    with pytest.raises(ValueError, match=r"pass `tokenizer=processor\.tokenizer`"):
        taught.model.action_stream("bridge_orig", reuse_reasoning=2)


def test_a_model_that_does_not_reason_refuses_to_reuse(tiny):
    model, _ = tiny()
    with pytest.raises(ValueError, match="need a model with `reasoning=True`"):
        model.action_stream(reuse_reasoning=5)


# Loading


def test_one_argument_makes_a_published_checkpoint_reason(recorded, tmp_path):
    """Published checkpoints that reason are saved like openvla-7b."""
    record = recorded("fused-224")
    plain, model = record.load(), record.load(reasoning=True)
    assert (plain.config.reasoning, plain.config.prompt_suffix_token_id) == (False, 29871)
    assert (model.config.reasoning, model.config.prompt_suffix_token_id) == (True, None)
    processor = AutoProcessor.from_pretrained(record.checkpoint, reasoning=True)
    assert processor.prompt_template == REASONING_PROMPT
    assert REASONING_PROMPT.endswith(" USER: What action should the robot take to {instruction}? ASSISTANT: TASK:")
    for one in (model, processor):
        one.save_pretrained(tmp_path)
    assert AutoProcessor.from_pretrained(tmp_path).prompt_template == REASONING_PROMPT
    assert AutoModel.from_pretrained(tmp_path).config.reasoning is True
    template = VICUNA_PROMPT.replace("What", "Which")
    own = AutoProcessor.from_pretrained(tmp_path, reasoning=True, prompt_template=template)
    assert own.prompt_template == template


def test_a_plain_config_has_no_field_for_reasoning(tiny):
    config = tiny_config()
    assert "reasoning" not in config.to_dict()
    assert "reasoning" not in config.to_diff_dict()
    config.reasoning = True
    assert type(config).from_dict(config.to_dict()).reasoning is True
    fields = config.to_dict() | {"action_decoding": "parallel", "action_dim": 7}
    with pytest.raises(ValueError, match="`reasoning=True` needs `action_decoding='autoregressive'`"):
        type(config).from_dict(fields)


def test_a_saved_model_reasons_as_before(taught, predict, tmp_path):
    for one in (taught.model, taught.processor):
        one.save_pretrained(tmp_path)
    model, processor = AutoModel.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    details = model.predict_action(
        **processor(taught.images["push"], instruction="push"),
        unnorm_key="bridge_orig",
        tokenizer=processor.tokenizer,
        return_details=True,
    )
    assert details.text == [TEXTS["push"]]
    assert np.array_equal(details.actions, predict("push").actions)
