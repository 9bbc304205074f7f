"""Names that others write in their programs are where they look for them."""

from __future__ import annotations

import importlib

import pytest

import rollouts

PLACES = {
    "rollouts": "Endpoint cli inference models pipeline providers recipes serving training",
    "rollouts.inference": "Completion EmbeddedEngine SamplingParams StopReason",
    "rollouts.providers": "Endpoint chat connect sample_tokens stream_chat stream_tokens",
    "rollouts.models": "load_hf_model make_model train_tokenizer add_lora save_lora merge_lora export_model",
    "rollouts.training": """
        Sample RLSample RolloutBatch SFTTrainingConfig TrainingConfig RLTrainingConfig RolloutConfig TrainFuture
        ImmediateTrainFuture InferenceEngine tokenize_conversation compute_loss_mask prepare_sft_sample
        export_samples_to_jsonl load_samples_from_jsonl export_samples_to_huggingface_format load_sft_dataset
        load_sft_samples load_rl_prompts load_dataset_with_answers DataBuffer create_buffer_from_jsonl
        load_prompts_from_jsonl load_prompts_from_list generate_rollout_batches apply_sample_transforms convert_to_batch
        AsyncRolloutManager check_any_success check_reward_nonzero_std check_min_reward check_response_diversity
        check_reasonable_length check_quality_and_diversity make_threshold_filter make_length_filter TrainingBackend
        PyTorchTrainingBackend FSDPConfig FSDPTrainingBackend create_pytorch_backend create_backend_with_scheduler
        create_fsdp_backend load_hf_model causal_lm_loss grpo_loss compute_grpo_loss ppo_loss compute_advantages
        compute_group_advantages run_pretraining run_sft_training collate_batch prepare_sft_batch run_rl_training
        run_offline_rl_training run_preference_training run_reward_training compute_reward prepare_grpo_batch
        sync_weights_to_engines WeightSyncManager SGLangEngine VLLMEngine update_sglang_weights_from_disk
        update_vllm_weights_from_disk MetricsLogger JSONLLogger WandbLogger CompositeLogger compute_stats_from_jsonl""",
    "rollouts.training.rollout_gen": "RolloutManager generate_rollout_batches",
    "rollouts.training.datasets.sft": "tokenize_conversation compute_loss_mask prepare_sft_sample",
    "rollouts.training.datasets.dataset_loaders": "load_sft_dataset load_rl_prompts",
    "rollouts.training.datasets.data_buffer": "DataBuffer",
    "rollouts.training.model_utils": "load_hf_model",
    "rollouts.training.sft_losses": "causal_lm_loss",
    "rollouts.training.rl_losses": "grpo_loss compute_grpo_loss ppo_loss",
    "rollouts.training.backends.protocol": "TrainingBackend",
    "rollouts.training.backends.pytorch_factory": """
        parse_dtype compute_device_map_single_gpu load_hf_model create_adamw_optimizer create_cross_entropy_loss
        create_warmup_cosine_scheduler create_pytorch_backend create_backend_with_scheduler""",
    "rollouts.training.distributed_utils": """
        init_process_group gloo_group is_main barrier all_reduce all_gather broadcast distributed_masked_whiten cleanup
        print_rank_0""",
    "rollouts.training.loops.sft_loop": "run_sft_training collate_batch prepare_sft_batch",
    "rollouts.training.loops.rl_loop": "run_rl_training compute_reward",
}


@pytest.mark.parametrize("place", PLACES)
def test_names_are_there(place: str) -> None:
    module = importlib.import_module(place)
    assert [name for name in PLACES[place].split() if not hasattr(module, name)] == []


@pytest.mark.parametrize("package", ["models", "providers", "training", "training.rewards"])
def test_every_exported_name_resolves(package: str) -> None:
    module = importlib.import_module(f"rollouts.{package}")
    for name in module.__all__:
        getattr(module, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        module.nothing  # noqa: B018


def test_the_package_itself_knows_no_other_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        rollouts.nothing  # noqa: B018
