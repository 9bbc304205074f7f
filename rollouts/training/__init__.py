"""Training: data, losses, backends and the loops that join them. Names are imported when first used."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "types": ("ImmediateTrainFuture", "RLSample", "RLTrainingConfig", "RolloutBatch", "Sample", "SampleStatus",
              "SFTTrainingConfig", "TrainFuture", "TrainingConfig", "WeightSpan"),
    "sft_losses": ("DeferredLogits", "LossOutput", "causal_lm_loss"),
    "rl_losses": ("compute_group_advantages", "compute_grpo_loss", "grpo_loss", "ppo_loss"),
    "algorithms.advantages": ("AdvantageBatch", "AdvantageConfig", "compute_advantages"),
    "algorithms.policy_losses": ("PolicyLossConfig", "make_policy_loss"),
    "algorithms.preference": ("PreferenceConfig", "make_preference_loss"),
    "algorithms.reward_model": ("reward_model_loss",),
    "algorithms.value": ("ValueLossConfig", "make_value_loss"),
    "backends": ("FSDPConfig", "FSDPTrainingBackend", "OptimizerConfig", "PyTorchTrainingBackend", "ScheduleConfig",
                 "TrainingBackend", "create_backend_with_scheduler", "create_fsdp_backend", "create_pytorch_backend"),
    "loops.preference_loop": ("PreferenceTrainingConfig", "run_preference_training"),
    "loops.reward_loop": ("RewardTrainingConfig", "run_reward_training"),
    "datasets.preferences": ("PreferenceDataset", "PreferencePair", "load_preference_dataset"),
    "loops": ("PretrainingConfig", "collate_batch", "prepare_sft_batch", "run_pretraining", "run_sft_training"),
    "loops.rl_batches": ("compute_reward", "prepare_rl_batch"),
    "loops.rl_loop": ("run_offline_rl_training", "run_rl_training"),
    "loops.rl_metrics": ("RolloutLog",),
    "loops.rl_step": ("prepare_grpo_batch",),
    "datasets.sft": ("compute_loss_mask", "prepare_sft_sample", "tokenize_conversation"),
    "datasets.sources": ("DatasetSpec",),
    "datasets.data_buffer": ("DataBuffer", "create_buffer_from_jsonl", "load_prompts_from_jsonl",
                             "load_prompts_from_list"),
    "datasets.dataset_loaders": ("SampleDataset", "export_samples_to_huggingface_format", "export_samples_to_jsonl",
                                 "load_dataset_with_answers", "load_rl_prompts", "load_samples_from_jsonl",
                                 "load_sft_dataset", "load_sft_samples"),
    "datasets.packing": ("best_fit_bins",),
    "metrics": ("CompositeLogger", "ConsoleLogger", "JSONLLogger", "MetricsLogger", "TensorBoardLogger",
                "TrackioLogger", "WandbLogger", "compute_stats_from_jsonl"),
    "functions": ("load_function",),
    "rewards": ("REWARDS", "RewardReport", "RewardRunner", "RewardSpec", "score_samples"),
    "weight_sync": ("InferenceEngine", "RolloutsEngine", "SGLangEngine", "SyncResult", "VLLMEngine",
                    "WeightSyncError", "WeightSyncManager", "sync_weights_to_engines",
                    "update_sglang_weights_from_disk", "update_vllm_weights_from_disk"),
    "model_utils": ("load_hf_model",),
    "rollout_gen": ("AsyncRolloutManager", "EngineGenerate", "RolloutConfig", "apply_sample_transforms",
                    "convert_to_batch", "generate_rollout_batches"),
    "filters": ("FilterResult", "all_of", "any_of", "check_any_success", "check_min_reward",
                "check_quality_and_diversity", "check_reasonable_length", "check_response_diversity",
                "check_reward_nonzero_std", "make_length_filter", "make_threshold_filter"),
}  # fmt: skip
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
