"""``load_hf_model`` under the name it has in ``rollouts.training``."""

from rollouts.models.load import load_hf_model

__all__ = ["load_hf_model"]
