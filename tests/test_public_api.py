"""The public API: a change of a name, a parameter or a flag fails here and needs an entry in CHANGELOG.md."""

import argparse
import importlib
import inspect
import re
from typing import Any

import pytest
from transformers import PreTrainedConfig

import openvla_hf
import openvla_hf.data
import openvla_hf.serving
from openvla_hf.cli import build_parser


# Functions, classes and methods with their parameters; constants and properties by their names.
API = {
    "openvla_hf": """
        ActionPrediction(actions, normalized_actions, token_ids, probabilities, entropy, forward_passes, text,
            reasoning_ids)
        ActionStream(model, unnorm_key)
        ActionStream.predict_action(input_ids, pixel_values, attention_mask, unnorm_key, state, return_details)
        ActionStream.reset()
        ActionTokenizer(vocab_end, n_bins)
        ActionTokenizer.bin_values
        ActionTokenizer.decode(token_ids)
        ActionTokenizer.encode(actions)
        ActionTokenizer.first_id
        AutoModelForVision2Seq
        ChunkStream(model, unnorm_key, execute, ensemble)
        ChunkStream.needs_observation
        ChunkStream.predict_action(input_ids, pixel_values, attention_mask, unnorm_key, state, **decoding)
        ChunkStream.reset()
        OpenVLAConfig(vision_config, fused_vision_config, text_config, vision_feature_layer, projector_hidden_act,
            image_token_index, prompt_suffix_token_id, n_action_bins, pad_to_multiple_of, pad_token_id, norm_stats,
            tie_word_embeddings, num_images, action_decoding, action_head, action_horizon, action_dim, proprio_dim,
            action_normalization, use_film, diffusion_steps, action_stop_token, reasoning)
        OpenVLAConfig.action_vocab_end
        OpenVLAConfig.is_parallel
        OpenVLAConfig.num_image_tokens
        OpenVLAConfig.num_prefix_tokens
        OpenVLAConfig.vision_configs
        OpenVLAForActionPrediction(config)
        OpenVLAForActionPrediction.action_stream(unnorm_key, execute, ensemble, reuse_reasoning, tokenizer)
        OpenVLAForActionPrediction.action_tokenizer
        OpenVLAForActionPrediction.compile_for_actions(mode)
        OpenVLAForActionPrediction.decode_actions(token_ids, unnorm_key)
        OpenVLAForActionPrediction.forward(input_ids, pixel_values, attention_mask, position_ids, past_key_values,
            inputs_embeds, labels, logits_to_keep, proprio, actions, action_mask, **kwargs)
        OpenVLAForActionPrediction.from_pretrained(pretrained_model_name_or_path, *model_args, output_loading_info,
            **kwargs)
        OpenVLAForActionPrediction.get_action_dim(unnorm_key)
        OpenVLAForActionPrediction.get_action_stats(unnorm_key)
        OpenVLAForActionPrediction.get_image_features(pixel_values, language_embedding)
        OpenVLAForActionPrediction.load_adapter(peft_model_id, adapter_name, **kwargs)
        OpenVLAForActionPrediction.norm_stats
        OpenVLAForActionPrediction.predict_action(input_ids, pixel_values, attention_mask, unnorm_key, state,
            stats, constrained, return_details, draft_token_ids, **decoding)
        OpenVLAForActionPrediction.save_pretrained(save_directory, **kwargs)
        OpenVLAImageProcessor(image_resize_strategy, size, image_mean, image_std, resample, letterbox_fill,
            center_crop_area)
        OpenVLAImageProcessor.preprocess(images, return_tensors)
        OpenVLAModel(config)
        OpenVLAModel.embed(input_ids, pixel_values, proprio)
        OpenVLAModel.forward(input_ids, pixel_values, attention_mask, position_ids, past_key_values, inputs_embeds,
            proprio, **kwargs)
        OpenVLAModel.get_image_features(pixel_values, language_embedding)
        OpenVLAModel.get_prefix_features(pixel_values, proprio, language_embedding)
        OpenVLAModel.place_prefix(inputs_embeds, input_ids, prefix)
        OpenVLAProcessor(image_processor, tokenizer, prompt_template, lowercase_instruction, strip_full_stop,
            image_token, image_token_id, num_image_tokens, cameras, state_dim)
        OpenVLAProcessor.__call__(*args, images, text, instruction, state, add_image_tokens, **kwargs)
        OpenVLAProcessor.build_prompt(instruction)
        ReasoningStream(model, unnorm_key, reuse_reasoning, tokenizer)
        ReasoningStream.predict_action(input_ids, pixel_values, attention_mask, unnorm_key, return_details, **inputs)
        ReasoningStream.reset()
        load_adapter(model, adapter, **hub_kwargs)
    """,
    "openvla_hf.data": """
        Augmentation(size, crop_area, brightness, contrast, saturation, hue)
        Augmentation.for_prediction(processor)
        BadEpisodeError(message, episodes)
        FirstOf(*names)
        Gripper(open, closed, binarize, dimensions)
        Gripper.to_openvla(values)
        MIXTURES
        Robot(name, camera, action, state, instruction, select, action_dim, rotation, relative, gripper, frequency,
            space, as_delta, every, drop_idle, cameras)
        TrainingStream(stream, rank, ranks, batch_size)
        compute_statistics(frames)
        from_episodes(episodes, robot, name, cache_key, every, drop_idle, streaming, skip_bad_episodes,
            cameras, chunk, chunk_end, state)
        load(data, robot, split, name, camera, every, drop_idle, streaming, shuffle_buffer, seed, skip_bad_episodes,
            cameras, chunk, chunk_end, state)
        load_mixture(mixture, folder, seed, num_frames, allow_missing, **options)
        load_statistics(path)
        mix(parts, seed)
        register_robot(robot)
        registered_robots()
        save_statistics(statistics, folder)
        write_lerobot(episodes, path, frequency, codec, action_names, state_names)
        write_rlds(episodes, path, episodes_per_file, quality, version)
    """,
    "openvla_hf.data.open_x": """
        DatasetRow(name, transform, cameras, state, state_encoding, action_encoding, frequency, idle_q01, idle_q99,
            source, table, check_gripper)
        DatasetRow.is_added
        DatasetRow.place
        DatasetRow.steps
        TableRobot(name, camera, action, state, instruction, select, action_dim, rotation, relative, gripper,
            frequency, space, as_delta, every, drop_idle, cameras, row)
        add_table(path)
        dataset_robot(name)
        find_row(name)
        known_table()
        standardize(name, trajectory, rng)
    """,
    "openvla_hf.testing": """
        BRIDGE_LIKE_STATS
        fake_episode(seed, steps, instruction, size)
        tiny_config(tokenizer, image_size, patch_size, vision_width, vision_layers, text_width, text_layers, heads,
            fused, norm_stats, **fields)
        tiny_processor(tokenizer, config)
        tiny_tokenizer(texts, merges, phrases)
        write_oft_components(folder, config, platform, head, proprio, film, step)
        write_tiny_oft(folder, platform, head, proprio, **components)
    """,
    "openvla_hf.checkpoints.assemble": """
        assemble(destination, language_model, dinov2, siglip, image_size, dtype, token, on_progress)
    """,
    "openvla_hf.checkpoints.convert": """
        BASE_MODELS
        convert(source, destination, checkpoint, tokenizer, dtype, revision, token, on_progress, **config_overrides)
    """,
    "openvla_hf.checkpoints.describe": """
        CheckpointInfo(layout, files, vision_towers, language_model, action_dims, dtype, quantization, parameters,
            size, base_model, has_code, statistics, statistics_file, oft)
        describe(source, revision, token)
    """,
    "openvla_hf.checkpoints.export": """
        export(source, destination, max_shard_size, revision, token)
    """,
    "openvla_hf.checkpoints.merge": """
        merge_adapter(adapter, output, base, dtype, max_shard_size, device_map, **config_overrides)
    """,
    "openvla_hf.checkpoints.push": """
        push(checkpoint, repo_id, processor, base_model, datasets, license, private, revision, create_pr,
            commit_message, max_shard_size, token)
    """,
    "openvla_hf.checkpoints.quantize": """
        FORMATS
        Format(about, package, make_config, layer_bytes, compute_capability)
        expected_weight_bytes(config, name, towers)
        quantization(name, towers, dtype)
        quantize(source, destination, name, towers, dtype, config, shard_bytes, on_progress, **hub_kwargs)
        weight_bytes(model)
    """,
    "openvla_hf.training.arguments": """
        FinetuneArguments(model, output, data, statistics, recipe, settings, model_kwargs, resume, matrix_rate,
            eval_share, validation, eval_frames, eval_data, keep_best, patience)
        TrainingData(source, options, weight)
        TrainingMixture(mixture, folder, options, allow_missing)
        TrainingMixture.select()
        TrainingMixture.select_validation()
    """,
    "openvla_hf.training.collator": """
        ActionCollator(processor, action_tokenizer, stats, prompt_suffix_token_id, norm_stats, augment, seed,
            normalization)
        ChunkCollator(config, **more)
    """,
    "openvla_hf.training.finetune": """
        FinetuneResult(figures, history)
        build_trainer(arguments)
        check_run(arguments)
        finetune(arguments)
        train(trainer, resume)
    """,
    "openvla_hf.training.recipes": """
        RECIPES
        Cost(trainable, parameters, weights, gradients, optimizer, activations)
        Recipe(lora_rank, lora_alpha, lora_dropout, lora_targets, trained, quantize, dtype, learning_rate,
            lr_scheduler_type, warmup_steps, weight_decay, max_grad_norm, batch_size, gradient_accumulation_steps,
            gradient_checkpointing, augment, seed, action_head, action_horizon, use_state, use_film,
            action_normalization, decay_step)
        estimate_cost(config, recipe, prompt_tokens, num_images, proprio_dim)
        recipe(name, **overrides)
    """,
    "openvla_hf.training.trainer": """
        ActionTrainer(model, args, data_collator, train_dataset, eval_collator, record, decay_step,
            matrix_rate, **kwargs)
        last_checkpoint(output_dir)
    """,
    "openvla_hf.evaluation.check": """
        CheckReport(model, data, findings)
        CheckReport.as_dict()
        CheckReport.failures
        CheckReport.passed
        Finding(check, status, found, fix)
        check(source, data, image, instruction, unnorm_key, loading, **reading)
        check_policy(model, processor, source, frames, image, instruction, unnorm_key)
        check_table(report)
    """,
    "openvla_hf.evaluation.doctor": """
        Report(name, robot, episodes, frames, instructions, shortest_episode, median_episode, longest_episode,
            bad_episodes, frames_without_instruction, idle, duplicates, lowest, highest, q01, q99, clipped,
            unused_dimensions, gripper_open, frequency, names, follows_state, motionless_start, histograms, model,
            warnings, table_row)
        examine(data, robot, split, camera, every, drop_idle, stats, max_images, progress, cameras,
            state)
        plot_actions(report, path, names)
        report_tables(report, names)
    """,
    "openvla_hf.evaluation.fidelity": """
        Fidelity(format, towers, observations, token_agreement, action_agreement, l1, gripper_flips, success, lost,
            won, weight_bytes, peak_bytes, latency)
        compare(checkpoint, formats, observations, towers, unnorm_key, device, dtype, episodes, baseline, on_progress)
        plot(results, path, names)
        table(results, names)
        tabletop_observations(count, first_seed)
    """,
    "openvla_hf.evaluation.latency": """
        Latency(device, threads, dtype, versions, parameters, weight_bytes, bandwidth, matmul, repeats, batches)
        latency_tables(result)
        measure_latency(
            model, processor, unnorm_key, batch_sizes, repeats, compile_passes, chunk_models, instruction, progress)
    """,
    "openvla_hf.evaluation.open_loop": """
        OpenLoopReport(dataset, episodes, frames, mean_absolute_error, l1, token_accuracy, gripper_agreement)
        evaluate_open_loop(model, processor, frames, unnorm_key, max_episodes, max_frames, seed, batch_size, progress)
        load_options(model, processor)
        open_loop_table(title, report, names)
    """,
    "openvla_hf.evaluation.suites": """
        SUITES
        Evaluation(suite, policy, folder, pictures)
        Evaluation.missing
        Evaluation.play(player)
        Evaluation.result()
        Evaluation.rollouts
        compare_runs(first, second)
        find_suite(name)
    """,
    "openvla_hf.suites.demonstrations": """
        record_experts(suite, seeds, noise, state)
    """,
    "openvla_hf.suites.play": """
        play(policy, episodes, simulators, keep_frames)
    """,
    "openvla_hf.suites.policies": """
        ModelPolicy(model, processor, unnorm_key, execute)
        model_policy(suite, model, processor, unnorm_key, is_trained_crop)
    """,
    "openvla_hf.suites.results": """
        Comparison(episodes, both, only_first, only_second, neither, difference, low, high, p_value)
        compare_results(first, second)
        mcnemar(only_first, only_second)
        newcombe(both, only_first, only_second, neither)
        success_by_task(rollouts)
        success_table(title, results)
        wilson(successes, episodes)
    """,
    "openvla_hf.suites.simulator": """
        Simulator(suite)
        SimulatorProcess(suite)
        open_simulators(suite, count, processes)
    """,
    "openvla_hf.suites.suite": """
        Episode(environment, seed)
        Protocol(episodes, first_seed, initial_states, max_steps, success, cameras, image_size, rotate, jpeg, resize,
            crop_area, settle_steps, settle_action, gripper, execute)
        Rollout(seed, task, instruction, success, moved_target, steps, frames, predictions,
            moved_object)
        Suite(name, environments, protocol, state_dim, packages)
        Suite.episodes()
        Suite.make(environment)
        Suite.select(tasks)
        Suite.with_protocol(**changes)
    """,
    "openvla_hf.evaluation.random_models": """
        chunk_model(model, horizon, head)
        random_model(size, dtype, device, text_config, **fields)
    """,
    "openvla_hf.tabletop.env": """
        MAX_STEP
        TASKS
        TabletopEnv(tasks, render_mode, max_steps, hand_noise, cameras, state)
    """,
    "openvla_hf.tabletop.expert": """
        expert_action(env)
        record_demonstrations(tasks, seeds, noise, cameras, state)
        rollout_expert(env, seed, noise, options)
    """,
    "openvla_hf.tabletop.pictures": """
        draw_strip(rollouts, columns)
        save_gif(rollouts, path, columns, frames_per_second)
    """,
    "openvla_hf.tabletop.rollouts": """
        CONDITIONS
        FIRST_UNSEEN_SEED
        TABLETOP_POLICY
        ModelPolicy(model, processor, unnorm_key, execute)
        Rollout(seed, task, instruction, success, moved_target, steps, frames, predictions,
            moved_object)
        load_policy(model, processor, unnorm_key, execute)
        check_robot(low, high)
        run_episodes(policy, seeds, tasks, condition, batch_size, keep_frames, cameras, state)
        success_by_task(rollouts)
        success_table(title, results)
    """,
    "openvla_hf.serving": """
        Client(url, token, timeout, jpeg_quality)
        Client.close()
        Client.info
        Client.predict_action(images, instruction, state, unnorm_key)
        Client.round_trip
        Client.session()
        SafetyLimits(max_translation, max_rotation, low, high)
        SafetyLimits.check(action, position)
        SafetyLimits.clip(action, position)
        ServerError(reason, kind, status, retry_after)
        UnsafeAction
    """,
    "openvla_hf.serving.client": """
        ClientSession(client)
        ClientSession.close()
        ClientSession.predict_action(images, instruction, state, unnorm_key)
        ClientSession.reset()
        RoundTrip(count, last, median, p95, longest)
    """,
    "openvla_hf.serving.episodes": """
        check_server(info, unnorm_key, suite)
        play_served(client, suite, episodes, simulators, keep_frames, unnorm_key)
        run_served_episodes(client, seeds, tasks, condition, robots, unnorm_key)
    """,
    "openvla_hf.cli": """
        main(argv)
    """,
}

COMMANDS = {
    "demo": """
        --model --unnorm-key --device --episodes --batch-size --task --output --json
    """,
    "evaluate": """
        policy --model --unnorm-key --device --episodes --batch-size --task --condition --execute --server
            --token-file --data --frames --robot --robots --split --camera --cameras --every --drop-idle --suite
            --output --envs --compare --json
    """,
    "record": """
        destination --suite --task --episodes --first-seed --cameras --state --format --json
    """,
    "predict": """
        --model --unnorm-key --device --image --instruction --state --platform --action-decoding --dtype --json
    """,
    "serve": """
        model --platform --action-decoding --revision --dtype --device --compile --engine --vllm-python --vllm-url
            --vllm-args --unnorm-key --gripper --execute
            --ensemble --control-frequency --camera --host --port --token-file --no-token --allow-host --ssl-certfile
            --ssl-keyfile --original-errors --max-batch --max-wait-ms --max-queue --max-sessions --max-pixels
            --max-rate --json
    """,
    "bench": """
        --model --random --chunk --cameras --state-dim --platform --action-decoding --unnorm-key --batch-sizes
        --repeats --compile --dtype --device --json
    """,
    "info": """
        checkpoint --revision --json
    """,
    "push": """
        checkpoint repo_id --base-model --dataset --license --private --revision --create-pr --message --json
    """,
    "export": """
        checkpoint destination --max-shard-size --revision --json
    """,
    "convert": """
        source destination --checkpoint --tokenizer --dtype --config --revision --json
    """,
    "assemble": """
        destination --dinov2 --siglip --language-model --image-size --dtype --json
    """,
    "finetune": """
        --data --mixture --data-dir --allow-missing --config --weights --robot --robots --split --camera --every
            --drop-idle --cameras --name --statistics --streaming --shuffle-buffer --skip-bad-episodes --model --output
            --recipe --set --steps --save-steps --logging-steps --keep --workers --resume --report-to --matrix-rate
            --dry-run --world-size --shard-size --throughput --count
            --eval-share --validation --eval-frames --keep-best --patience --json
    """,
    "check": """
        model --data --device --dtype --image --instruction --unnorm-key --strict --platform --action-decoding
        --reasoning --robot --robots --split --camera --every --drop-idle --cameras --json
    """,
    "doctor": """
        data --robot --robots --split --camera --every --drop-idle --model --unnorm-key --frames --cameras --state
            --plot --json
    """,
    "merge": """
        adapter output --base --dtype --max-shard-size --json
    """,
    "quantize": """
        source destination --bits --format --towers --revision --report --data --robot --robots --split --camera
            --every --drop-idle --frames --episodes --baseline --unnorm-key --device --dtype --output --json
    """,
}


def parameters(value: Any) -> list[str]:
    if isinstance(value, type) and issubclass(value, PreTrainedConfig):  # only its own fields
        return [name for name in value.__annotations__ if name in value.__dataclass_fields__]
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    found = inspect.signature(value).parameters.values()
    return [stars.get(one.kind, "") + one.name for one in found if one.name != "self"]


def entries(text: str) -> dict[str, list[str] | None]:
    """Read entries as name -> parameters, or `None` for a name without parentheses."""
    found = re.findall(r"([\w.]+)(\([^)]*\))?", text)
    return {name: re.findall(r"[\w*]+", inside) if inside else None for name, inside in found}


@pytest.mark.parametrize("module", API)
def test_the_public_functions_and_classes_keep_their_parameters(module):
    for name, listed in entries(API[module]).items():
        value: Any = importlib.import_module(module)
        for part in name.split("."):
            value = getattr(value, part)
        if listed is not None:
            assert parameters(value) == listed, name


@pytest.mark.parametrize(
    "package", [openvla_hf, openvla_hf.data, openvla_hf.serving], ids=lambda package: package.__name__
)
def test_the_packages_export_exactly_the_listed_names(package):
    assert set(package.__all__) == {name for name in entries(API[package.__name__]) if "." not in name}


def test_the_commands_have_exactly_the_listed_flags():
    (commands,) = [one for one in build_parser()._actions if isinstance(one, argparse._SubParsersAction)]
    found = {
        name: {action.option_strings[-1] if action.option_strings else action.dest for action in parser._actions}
        for name, parser in commands.choices.items()
    }
    assert found == {name: {"--help", *flags.split()} for name, flags in COMMANDS.items()}
