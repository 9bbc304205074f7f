"""Everything that a run loads before its first step; the server that runs are forked from has done it already."""

import rl_run  # noqa: F401
import training_run  # noqa: F401
import transformers.models.qwen3.modeling_qwen3  # noqa: F401
import writer  # noqa: F401
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

get_checkpoint_conversion_mapping("qwen3")  # the first call builds tables for every architecture
