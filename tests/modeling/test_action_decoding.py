import copy
import functools
import os
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModel, LogitsProcessorList, MistralConfig

from openvla_hf.modeling.action_decoding import ActionIdsOnly, action_pass
from openvla_hf.testing import BRIDGE_LIKE_STATS, fake_episode, tiny_config, tiny_processor


INSTRUCTIONS = ["pick up the red block", "open", "put the carrot on the very large plate on the left"]
STEPS = len(BRIDGE_LIKE_STATS["q01"])
TWO_ARMS = {name: values * 2 for name, values in BRIDGE_LIKE_STATS.items()}


def images(count, seed=0):
    return [frame["image"] for frame in fake_episode(seed, steps=count)]


@torch.no_grad()
def generated(model, inputs, steps=STEPS, constrained=True):
    """Generate ids (B, steps) greedily with `generate`, after prompts that are padded on the left."""
    end_id = model.config.action_vocab_end
    only = [ActionIdsOnly(end_id - model.config.n_action_bins, end_id)] if constrained else []
    options = {"max_new_tokens": steps, "min_new_tokens": steps, "do_sample": False}
    ids = model.generate(**inputs, **options, logits_processor=LogitsProcessorList(only))
    return ids[:, -steps:].numpy()


def drafts_of(right, config):
    """Make drafts for action ids (B, A): good ones, bad ones, and some that are not ids."""
    end_id, count = config.action_vocab_end, right.shape[1]
    wrong = end_id - 1 - (end_id - right) % config.n_action_bins
    assert (wrong != right).all()
    return {
        "right": right,
        "wrong": wrong,
        "half right": np.where(np.arange(count) < count // 2, right, wrong),
        "right but for the first": np.where(np.arange(count) < 1, wrong, right),
        "random": np.random.default_rng(0).integers(end_id - config.n_action_bins, end_id, right.shape),
        "too short": right[:, : count // 3],
        "empty": right[:, :0],
        "too long": np.concatenate([right, wrong], axis=1),
        "one row for all": torch.from_numpy(right[0]),
        "a list": wrong[:1].tolist(),
        "no ids": np.where(np.arange(count) % 2, -7, 10**9) + 0 * right,
        "placeholders": np.full_like(right, config.image_token_id),
    }


@pytest.fixture
def policy(tiny):
    """Return a function that builds (model, processor) without a prompt suffix, for an attention implementation."""

    def build(attention="sdpa", **fields):
        model, processor = tiny(**fields)
        model.set_attn_implementation(attention)
        model.config.prompt_suffix_token_id = None
        return model, processor

    return build


def predict(model, inputs, **options):
    return model.predict_action(**inputs, return_details=True, **options)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("constrained", [True, False])
@pytest.mark.parametrize("rows", [1, 3])
def test_the_tokens_are_those_of_generate_whatever_the_draft(policy, attention, constrained, rows):
    model, processor = policy(attention)
    inputs = processor(images(rows), instruction=INSTRUCTIONS[:rows])
    right = generated(model, inputs, constrained=constrained)
    plain = predict(model, inputs, constrained=constrained)
    assert plain.forward_passes == STEPS
    assert np.array_equal(plain.token_ids, right)
    for name, draft in drafts_of(right, model.config).items():
        details = predict(model, inputs, constrained=constrained, draft_token_ids=draft)
        assert np.array_equal(details.token_ids, right), name
        assert np.array_equal(details.actions, plain.actions), name
        assert np.abs(details.probabilities - plain.probabilities).max() <= 1e-4, name
        assert np.abs(details.entropy - plain.entropy).max() <= 1e-3, name
        assert 1 <= details.forward_passes <= STEPS, name
        if name in ("right", "too long"):
            assert details.forward_passes == 1
        if name == "wrong":
            assert details.forward_passes > 1


def test_each_right_token_of_a_draft_saves_a_pass(policy):
    model, processor = policy()
    inputs = processor(images(1), instruction=INSTRUCTIONS[0])
    right = generated(model, inputs)
    wrong = drafts_of(right, model.config)["wrong"]
    for count in range(STEPS + 1):
        draft = np.where(np.arange(STEPS) < count, right, wrong)
        details = predict(model, inputs, draft_token_ids=draft)
        assert np.array_equal(details.token_ids, right)
        assert details.forward_passes <= max(1, STEPS - count)


def test_a_row_that_is_right_is_left_alone(policy):
    model, processor = policy()
    inputs = processor(images(3), instruction=INSTRUCTIONS)
    right = generated(model, inputs)
    wrong = drafts_of(right, model.config)["wrong"]
    all_right = predict(model, inputs, draft_token_ids=right)
    for row in range(3):
        one_right = predict(model, inputs, draft_token_ids=np.where(np.arange(3)[:, None] == row, right, wrong))
        assert one_right.forward_passes > all_right.forward_passes == 1
        assert np.array_equal(one_right.token_ids, right)
        assert np.array_equal(one_right.probabilities[row], all_right.probabilities[row])


def test_rows_of_different_length_and_action_dimension(policy):
    model, processor = policy(norm_stats={"one": {"action": BRIDGE_LIKE_STATS}, "two": {"action": TWO_ARMS}})
    keys, inputs = ["one", "two", "one"], processor(images(3), instruction=INSTRUCTIONS)
    right = generated(model, inputs, steps=2 * STEPS)
    singles = [
        model.predict_action(**processor(image, instruction=text), unnorm_key=key)
        for image, text, key in zip(images(3), INSTRUCTIONS, keys, strict=True)
    ]
    for name, draft in {"none": None, **drafts_of(right, model.config)}.items():
        details = predict(model, inputs, unnorm_key=keys, draft_token_ids=draft)
        assert details.forward_passes <= 2 * STEPS
        for row, key in enumerate(keys):
            count = model.get_action_dim(key)
            assert np.array_equal(details.token_ids[row, :count], right[row, :count]), name
            assert np.array_equal(details.actions[row, :count], singles[row]), name
    # Tokens after the last dimension of a row do not matter.
    long_enough = np.where(np.arange(2 * STEPS) < np.array([[7], [14], [7]]), right, model.config.action_vocab_end - 1)
    assert predict(model, inputs, unnorm_key=keys, draft_token_ids=long_enough).forward_passes == 1


def test_drafts_and_padding_on_the_right(policy):
    model, processor = policy()
    inputs = processor(images(3), instruction=INSTRUCTIONS)
    right = generated(model, inputs)
    for row, length in enumerate(inputs["attention_mask"].sum(1)):
        for name in ("input_ids", "attention_mask"):
            inputs[name][row] = inputs[name][row].roll(int(length))
    for draft in drafts_of(right, model.config).values():
        assert np.array_equal(predict(model, inputs, draft_token_ids=draft).token_ids, right)


@pytest.mark.parametrize("draft", [3, [[1] * STEPS] * 2, np.ones((1, 1, STEPS))])
def test_a_draft_of_another_batch(policy, draft):
    model, processor = policy()
    inputs = processor(images(3), instruction=INSTRUCTIONS)
    with pytest.raises(ValueError, match="do not fit 3 observations: give one row of integer ids, or one for each"):
        model.predict_action(**inputs, draft_token_ids=draft)


@pytest.mark.parametrize("case", ["fused-224", "siglip-224"])
def test_the_recorded_tokens_come_whatever_the_draft(recorded, case):
    record = recorded(case)
    model = record.model
    for prediction in record.expected["predictions"][::3]:  # enough, since each tries every draft
        right = np.array([prediction["action_token_ids"]])
        steps = right.shape[1]
        inputs = record.inputs(prediction)
        drafts = drafts_of(right, model.config)
        options = {"unnorm_key": prediction["unnorm_key"], "constrained": False}
        assert predict(model, inputs, draft_token_ids=right, **options).forward_passes == 1
        # One row for each draft, cut or padded to the same length.
        rows = [np.resize(np.append(np.ravel(draft), [-1] * steps), steps) for draft in drafts.values()]
        batch = {name: tensor.expand(len(rows), *tensor.shape[1:]) for name, tensor in inputs.items()}
        details = predict(model, batch, draft_token_ids=np.stack(rows), **options)
        assert np.array_equal(details.token_ids, right.repeat(len(rows), axis=0))
        assert 1 < details.forward_passes <= steps


# Heads and language models


def check_against_generate(model, inputs):
    right = generated(model, inputs)
    assert np.array_equal(predict(model, inputs).token_ids, right)
    for draft in (right, drafts_of(right, model.config)["wrong"]):
        assert np.array_equal(predict(model, inputs, draft_token_ids=draft).token_ids, right)
    return right


@pytest.mark.parametrize("targets", [["lm_head"], ["q_proj", "v_proj", "down_proj"]])
def test_adapters_count(policy, targets):
    model, processor = policy()
    inputs = processor(images(3), instruction=INSTRUCTIONS)
    before = check_against_generate(model, inputs)
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=8, lora_alpha=64, target_modules=targets, init_lora_weights=False))
    after = check_against_generate(adapted, inputs)
    assert not np.array_equal(before, after)
    with adapted.disable_adapter():
        assert np.array_equal(predict(adapted, inputs).token_ids, before)


@torch.no_grad()
def test_a_head_that_is_changed_in_place_counts(policy):
    model, processor = policy()
    inputs = processor(images(3), instruction=INSTRUCTIONS)
    before = check_against_generate(model, inputs)
    model.lm_head.weight.neg_()
    assert not np.array_equal(check_against_generate(model, inputs), before)
    model.lm_head.weight = torch.nn.Parameter(-model.lm_head.weight)
    assert np.array_equal(check_against_generate(model, inputs), before)


@pytest.mark.parametrize("window", [4096, 8])
def test_a_sliding_window(tokenizer, window):
    """A window wider than the prompt has no effect; a narrower one goes through `generate`."""
    config = tiny_config(tokenizer)
    sizes = {name: getattr(config.text_config, name) for name in ("vocab_size", "hidden_size", "num_attention_heads")}
    config.text_config = MistralConfig(
        **sizes, intermediate_size=128, num_hidden_layers=2, num_key_value_heads=1, sliding_window=window
    )
    torch.manual_seed(0)
    model, processor = AutoModel.from_config(config).eval(), tiny_processor(tokenizer, config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    for image in images(2):  # the second call uses the cache of the first
        check_against_generate(model, processor(image, instruction=INSTRUCTIONS[0]))


def test_attention_that_takes_no_such_mask_goes_through_generate(policy, monkeypatch):
    model, processor = policy()
    inputs = processor(images(3), instruction=INSTRUCTIONS)
    expected = predict(model, inputs)
    calls, generate = [], model.generate

    def count(**options):
        calls.append(options["max_new_tokens"])
        model.config.text_config._attn_implementation = "sdpa"  # the others do not run everywhere
        return generate(**options)

    monkeypatch.setattr(model, "generate", count)
    for attention in ("flash_attention_2", "flex_attention"):
        model.config.text_config._attn_implementation = attention
        details = predict(model, inputs, draft_token_ids=expected.token_ids)
        assert np.array_equal(details.token_ids, expected.token_ids)
        assert np.abs(details.probabilities - expected.probabilities).max() <= 1e-4
    assert calls == [STEPS] * 2


# The cache


def storage(model):
    (cache,) = model.action_caches.values()
    return [tensor.data_ptr() for layer in cache.layers for tensor in (layer.keys, layer.values)]


def test_calls_share_a_cache_and_nothing_leaks(policy):
    model, processor = policy()
    long = processor(images(1), instruction="put the red block and the green cup on the plate")
    short = processor(images(1, seed=1), instruction="open")
    first = predict(model, long)
    alone = {"long": first.probabilities, "short": predict(policy()[0], short).probabilities}
    for name, inputs in [("short", short), ("long", long), ("short", short), ("long", long)]:
        for draft in (None, first.token_ids):
            probabilities = predict(model, inputs, draft_token_ids=draft).probabilities
            assert np.abs(probabilities - alone[name]).max() <= 1e-4
            if draft is None:
                assert np.array_equal(probabilities, alone[name])
    memory = storage(model)
    model.predict_action(**long)
    assert storage(model) == memory


def test_dtype_inference_mode_and_autocast_may_change_between_calls(policy):
    model, processor = policy()
    inputs = processor(images(1), instruction=INSTRUCTIONS[0])
    expected = model.predict_action(**inputs)
    with torch.inference_mode():
        assert np.array_equal(model.predict_action(**inputs), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert np.isfinite(model.predict_action(**inputs)).all()
    assert np.isfinite(model.bfloat16().predict_action(**inputs)).all()
    assert np.isfinite(model.float().predict_action(**inputs)).all()


def test_threads_may_predict_at_once(policy):
    model, processor = policy()
    observations = [processor(image, instruction=INSTRUCTIONS[i % 3]) for i, image in enumerate(images(6))]
    expected = [predict(model, inputs) for inputs in observations]

    def work(i):
        draft = None if i % 2 else expected[i % 6 - 1].token_ids
        return predict(model, observations[i % 6], draft_token_ids=draft).token_ids

    with ThreadPoolExecutor(4) as pool:
        for i, token_ids in enumerate(pool.map(work, range(24))):
            assert np.array_equal(token_ids, expected[i % 6].token_ids)


# Numbers that are not finite


DECODINGS = {
    "greedy": {},
    "unconstrained": {"constrained": False},
    "draft": {"draft_token_ids": [[0] * STEPS]},
    "sampling": {"do_sample": True},
    "unconstrained sampling": {"do_sample": True, "constrained": False},
    "beams": {"num_beams": 3},
}
each_decoding = pytest.mark.parametrize("options", DECODINGS.values(), ids=DECODINGS)


def spoil_pixels(inputs, row, value):
    pixel_values = inputs["pixel_values"].clone()
    pixel_values[row, 0, 0, 0] = value
    return inputs | {"pixel_values": pixel_values}


@each_decoding
def test_nan_logits_are_refused(policy, options):
    model, processor = policy()
    inputs = processor(images(2), instruction=INSTRUCTIONS[:2])
    with torch.no_grad():
        model.model.projector.fc1.bias[0] = torch.nan
    with pytest.raises(ValueError, match=r"not finite for observations 0, 1: .* weights.* float16"):
        model.predict_action(**inputs, **options)
    with pytest.raises(ValueError, match="not finite for observations 0, 1: "):
        predict(model, inputs, **options)


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
@each_decoding
def test_a_frame_that_is_not_finite_is_named_and_leaves_the_next_call_alone(policy, options, value):
    model, processor = policy()
    inputs = processor(images(3), instruction=INSTRUCTIONS)
    expected = predict(model, inputs)
    with pytest.raises(ValueError, match="not finite for observation 1: "):
        model.predict_action(**spoil_pixels(inputs, 1, value), **options)
    assert np.array_equal(predict(model, inputs).probabilities, expected.probabilities)


@each_decoding
@torch.no_grad()
def test_a_spoilt_token_after_the_first_is_refused(policy, options):
    model, processor = policy()
    inputs = processor(images(1), instruction=INSTRUCTIONS[0])
    first = predict(model, inputs, constrained=options.get("constrained", True)).token_ids[0, 0]
    model.get_input_embeddings().weight[first] = torch.nan
    with pytest.raises(ValueError, match="not finite for observation 0: "):
        model.predict_action(**inputs, **options | ({"temperature": 1e-6} if "do_sample" in options else {}))


@torch.no_grad()
def test_an_infinite_logit_is_refused(policy):
    model, processor = policy()
    inputs = processor(images(1), instruction=INSTRUCTIONS[0])
    head = model.lm_head.weight
    for token_id, options in ((model.config.action_vocab_end - 9, {}), (5, {"constrained": False})):
        row = head[token_id].clone()
        head[token_id] = torch.inf
        with pytest.raises(ValueError, match="not finite for observation 0: "):
            model.predict_action(**inputs, **options)
        head[token_id] = row
    assert np.isfinite(model.predict_action(**inputs)).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("rows", [1, 2])
@torch.no_grad()
def test_beams_refuse_a_spoilt_logit_anywhere_in_the_vocabulary(policy, rows, value):
    model, processor = policy()
    inputs = processor(images(rows), instruction=INSTRUCTIONS[:rows])
    model.lm_head.weight[5] = value
    with pytest.raises(ValueError, match="not finite for observation"):
        model.predict_action(**inputs, num_beams=2)


@torch.no_grad()
def test_float16_that_overflows_is_refused(policy):
    model, processor = policy()
    inputs = processor(images(1), instruction=INSTRUCTIONS[0])
    for weight in (model.model.language_model.norm.weight, model.lm_head.weight):
        weight.mul_(1e3)
    assert np.isfinite(model.predict_action(**inputs)).all()
    with pytest.raises(ValueError, match="float16"):
        model.half().predict_action(**inputs)


@torch.no_grad()
def test_tokens_after_the_last_dimension_of_a_row_may_be_anything(policy):
    model, processor = policy(norm_stats={"one": {"action": BRIDGE_LIKE_STATS}, "two": {"action": TWO_ARMS}})
    inputs = processor(images(2), instruction=INSTRUCTIONS[:2])
    expected = predict(model, inputs, unnorm_key=["one", "two"])
    # The last token of the first row's action is read only to predict the tokens after it.
    last = expected.token_ids[0, STEPS - 1]
    assert last not in expected.token_ids[0, : STEPS - 1]
    assert last not in expected.token_ids[1, :-1]
    model.get_input_embeddings().weight[last] = torch.nan
    actions = model.predict_action(**inputs, unnorm_key=["one", "two"])
    assert np.array_equal(actions, expected.actions, equal_nan=True)


def test_of_equal_logits_the_first_is_chosen(policy):
    model, processor = policy()
    inputs = processor(images(1), instruction=INSTRUCTIONS[0])
    torch.nn.init.zeros_(model.lm_head.weight)
    for options in (DECODINGS["greedy"], DECODINGS["draft"]):
        assert (predict(model, inputs, **options).token_ids == model.action_tokenizer.first_id).all()


# Control loops


def test_a_stream_gives_the_actions_of_predict_action(policy):
    model, processor = policy()
    stream = model.action_stream()
    frames = [image for image in images(3) for _ in range(2)]
    for i, image in enumerate(frames):
        inputs = processor(image, instruction=INSTRUCTIONS[0])
        expected, action = predict(model, inputs), stream.predict_action(**inputs)
        assert np.array_equal(action, expected.actions[0])
        assert np.array_equal(stream.token_ids, expected.token_ids)
        if i == 0:
            assert stream.forward_passes == STEPS
        if i % 2:  # nothing has moved
            assert stream.forward_passes == 1
    stream.reset()
    assert stream.token_ids is None
    details = stream.predict_action(**inputs, return_details=True)
    assert details.forward_passes == stream.forward_passes == STEPS


def test_a_stream_of_several_robots_may_lose_one(policy):
    model, processor = policy(norm_stats={"one": {"action": BRIDGE_LIKE_STATS}, "two": {"action": TWO_ARMS}})
    stream = model.action_stream("one")
    for rows in (3, 3, 2, 1):
        inputs = processor(images(rows), instruction=INSTRUCTIONS[:rows])
        assert np.array_equal(stream.predict_action(**inputs), model.predict_action(**inputs, unnorm_key="one"))


def test_a_stream_takes_the_key_of_a_call(policy):
    model, processor = policy(norm_stats={"one": {"action": BRIDGE_LIKE_STATS}, "two": {"action": TWO_ARMS}})
    inputs = processor(images(1), instruction=INSTRUCTIONS[0])
    for stream in (model.action_stream(), model.action_stream("one")):
        for key in ("two", "one", "two"):
            expected = model.predict_action(**inputs, unnorm_key=key)
            assert np.array_equal(stream.predict_action(**inputs, unnorm_key=key), expected)
    assert np.array_equal(stream.predict_action(**inputs), model.predict_action(**inputs, unnorm_key="one"))
    with pytest.raises(ValueError, match="Unknown `unnorm_key` 'three'"):
        stream.predict_action(**inputs, unnorm_key="three")


# Compiled


def copies(model):
    return [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]


def test_copies_and_pickles_act_and_hold_no_cache(policy):
    model, processor = policy()
    inputs = processor(images(1), instruction=INSTRUCTIONS[0])
    expected = model.predict_action(**inputs)
    with torch.inference_mode():
        model.predict_action(**inputs)
    for other in copies(model):
        assert other.action_caches == {}
        assert other.action_pass is action_pass
        assert np.array_equal(other.predict_action(**inputs), expected)
    assert len(model.action_caches) == 1


def test_a_copy_of_a_compiled_model_compiles_by_itself(policy):
    model, _ = policy()
    model.compile_for_actions("max-autotune-no-cudagraphs")
    for other in copies(model):
        assert other.action_pass is not model.action_pass
        assert other.action_pass.compiled is not model.action_pass.compiled
        assert other.action_pass.mode == "max-autotune-no-cudagraphs"


@pytest.fixture
def small_policy(policy):
    """Like `policy`, with as few layers as possible, because compiling each takes a while."""
    return functools.partial(policy, vision_layers=2, text_layers=1)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler")
def test_a_pass_in_code_for_this_machine_gives_the_same(small_policy):
    model, processor = small_policy(fused=False)
    inputs = processor(images(1), instruction=INSTRUCTIONS[0])
    plain = predict(model, inputs)
    model.compile_for_actions()
    with torch._inductor.config.patch(compile_threads=1):  # starting more threads takes longer than they save
        details = predict(model, inputs, draft_token_ids=plain.token_ids)
    assert model.action_pass is not action_pass, "it compiled nothing"
    assert details.forward_passes == 1
    assert np.array_equal(details.token_ids, plain.token_ids)
    assert np.abs(details.probabilities - plain.probabilities).max() <= 1e-4


@pytest.mark.slow
def test_compiled_passes_give_the_same(small_policy, monkeypatch):
    # Every graph is captured and run. Only the test above generates code, which takes most of the time.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    model, processor = small_policy()
    observations = [processor(image, instruction=text) for image, text in zip(images(2), INSTRUCTIONS, strict=False)]
    expected = [predict(model, inputs) for inputs in observations]
    model.compile_for_actions()
    for _ in range(2):
        for inputs, plain in zip(observations, expected, strict=True):
            right = plain.token_ids
            for draft in (None, right, drafts_of(right, model.config)["wrong"]):
                details = predict(model, inputs, draft_token_ids=draft)
                assert np.array_equal(details.token_ids, right)
                assert np.abs(details.probabilities - plain.probabilities).max() <= 1e-4
                assert details.forward_passes <= STEPS
        for draft in (None, right):
            with pytest.raises(ValueError, match="not finite for observation 0: "):
                model.predict_action(**spoil_pixels(inputs, 0, torch.nan), draft_token_ids=draft)
    assert model.action_pass is not action_pass
    for other in copies(model):
        assert np.array_equal(predict(other, inputs).token_ids, plain.token_ids)
        assert other.action_pass is not action_pass


NO_COMPILER = """
import sys, warnings
import numpy as np
import torch._inductor.config
from transformers import AutoModel, AutoProcessor
import openvla_hf

torch._inductor.config.cpp.cxx = (None, "/no/compiler")
torch._inductor.config.compile_threads = 1
model, processor = AutoModel.from_pretrained(sys.argv[1]), AutoProcessor.from_pretrained(sys.argv[1])
inputs = processor(np.zeros((64, 64, 3), np.uint8), instruction="open")
expected = model.predict_action(**inputs)
model.compile_for_actions()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        assert np.array_equal(model.predict_action(**inputs), expected)
print([str(one.message) for one in caught if "Compilation failed" in str(one.message)])
"""


@pytest.mark.slow
def test_without_a_compiler_it_warns_once_and_continues(small_policy, run_python, tmp_path):
    model, processor = small_policy(fused=False)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    cache = str(tmp_path / "inductor")
    result = run_python(NO_COMPILER, tmp_path / "model", TORCHINDUCTOR_CACHE_DIR=cache, TORCHDYNAMO_DISABLE="0")
    assert result.stdout.count("Compilation failed, so actions are predicted without it: ") == 1
