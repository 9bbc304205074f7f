"""vLLM's side of a push over gloo, loaded by vLLM itself (``vllm.general_plugins``) where this package is installed.

Chosen with ``--weight-transfer-config '{"backend": "gloo"}'``. The weights come from the trainer's rank 0, or from a
folder that vLLM's machine can read. A tied output layer is prepared anew at the end: vLLM's CPU kernels keep a packed
copy of it that reloading leaves behind (0.32).
"""

from __future__ import annotations


def register() -> None:
    """Called by vLLM in each of its processes."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if "gloo" not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine("gloo", "rollouts.training.vllm_transport", "GlooTransport")
