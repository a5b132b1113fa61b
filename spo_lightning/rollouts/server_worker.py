"""What a vLLM server needs of ours: a worker extension that describes the server and loads weights from a file.

``vllm serve MODEL --worker-extension-cls spo_lightning.rollouts.server_worker.ServerWorker`` mixes it into every worker
process; ``VLLMServerEngine`` calls it through the server's ``/collective_rpc``. What goes wrong with the weights is
returned rather than raised, because vLLM answers an exception in a worker with a bare "internal server error".
"""

from __future__ import annotations

from typing import Any

import torch
from safetensors import SafetensorError, safe_open


class ServerWorker:
    """Methods for vLLM's worker; ``vllm_config`` and ``model_runner`` are the worker's own."""

    vllm_config: Any
    model_runner: Any

    def spo_describe(self) -> dict[str, Any]:
        """What a trainer must know about the server before it sends a request."""
        config = self.vllm_config.model_config
        return {
            "model": config.model,
            "dtype": str(config.dtype).removeprefix("torch."),
            "max_model_len": config.max_model_len,
            "vocab_size": config.get_vocab_size(),
            "logprobs_mode": config.logprobs_mode,
            "max_logprobs": config.max_logprobs,
        }

    def spo_load_weights(self, path: str) -> dict[str, Any]:
        """Load a full set of weights, one tensor in memory at a time; call it while no request is under way.

        Args:
            path: safetensors file with the parameters under their names in the checkpoint.

        Returns:
            ``{"problem": ""}``, or what does not fit. The model then holds a mixture of old and new values.
        """
        try:
            with safe_open(path, framework="pt") as weights:
                missing = self._load(weights)
        except (OSError, SafetensorError, ValueError, KeyError, RuntimeError) as error:
            return {"problem": f"{type(error).__name__}: {error}"}
        return {"problem": f"{', '.join(sorted(missing))} missing from {path}" if missing else ""}

    @torch.inference_mode()
    def _load(self, weights: Any) -> set[str]:
        """Load all tensors of the file; the model's parameters that got none."""
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

        model = self.model_runner.get_model()
        expected = {name for name, _ in model.named_parameters()}
        with set_current_vllm_config(self.vllm_config):
            initialize_layerwise_reload(model)
            try:
                loaded = model.load_weights((name, weights.get_tensor(name)) for name in weights.keys())
            finally:  # after an error too: it puts the tensors back that the kernels use
                finalize_layerwise_reload(model, self.vllm_config.model_config)
        if getattr(model.config, "tie_word_embeddings", False) and hasattr(model, "lm_head"):
            # the CPU keeps a packed copy of the tied head, which nothing else refreshes
            model.lm_head.quant_method.process_weights_after_loading(model.lm_head)
        return expected - loaded
