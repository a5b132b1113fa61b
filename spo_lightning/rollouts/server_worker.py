"""What a vLLM server needs of ours: a worker extension that describes it, and a back end of its weight-transfer API.

``vllm serve MODEL --worker-extension-cls spo_lightning.rollouts.server_worker.ServerWorker`` mixes the extension into
every worker process and makes the back end known there; ``--weight-transfer-config '{"backend": "spo"}'`` chooses it.
What goes wrong with the weights is kept for ``spo_weight_problem`` rather than raised, because vLLM answers an
exception in a worker with a bare "internal server error".
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from vllm.config import set_current_vllm_config
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferEngine
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from spo_lightning.rollouts.vllm_weights import hide_tokens, renew_packed
from spo_lightning.rollouts.weight_group import MODEL_SIZES, TRANSFER_BACKEND, GroupInfo, TransferLost, WeightGroup


@dataclass(frozen=True)
class PushInfo:
    """How one full set of weights comes.

    Attributes:
        path: safetensors file with the parameters under their names in the checkpoint; "" when they are broadcast.
        buckets: what each broadcast holds, one after the other: name, dtype and shape of every parameter.
    """

    path: str = ""
    buckets: list[list[tuple[str, str, list[int]]]] = field(default_factory=list)


class WeightReceiver(WeightTransferEngine):
    """Loads full sets of weights, from a file or as the trainer broadcasts them.

    A set is loaded within ``receive_weights``, from the first step of vLLM's reloading to the last, so that a trainer
    that dies in the middle leaves no model half taken apart.

    Attributes:
        problem: what went wrong at the last ``init_transfer_engine`` or ``update_weights``, or "". The model may then
            hold a mixture of old and new values.
        lost: whether that was on the way between the trainer and here, so that another try may do.
        updating: whether an update has begun and not ended.
    """

    init_info_cls = GroupInfo
    update_info_cls = PushInfo
    supports_draft_weight_update = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.problem, self.lost = "", False
        self.updating = False
        self._group: WeightGroup | None = None

    def init_transfer_engine(self, init_info: GroupInfo) -> None:
        """Join the trainer's group; an earlier one is left."""
        self.shutdown()
        self.problem, self.lost = "", False
        try:
            self._group = WeightGroup(init_info, 1 + self.parallel_config.rank, self.device)
        except Exception as error:
            self._keep("cannot join the trainer's group", error)

    def start_weight_update(self) -> None:
        """Note that an update has begun; ``update_weights`` does all."""
        self.updating = True

    def finish_weight_update(self) -> None:
        """Note that it has ended."""
        self.updating = False

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load one full set of weights; call it while no request is under way.

        Raises nothing: an error of any kind is kept as the ``problem``. vLLM's loaders assert, and would leave an
        update open that nobody can end.
        """
        self.problem, self.lost = "", False
        try:
            self.receive_weights(self.parse_update_info(update_info))
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
        except Exception as error:
            self._keep("cannot load the weights", error)

    def receive_weights(self, update_info: PushInfo) -> None:
        """Load one full set of weights, one tensor or one broadcast in memory at a time.

        Raises:
            ValueError: a parameter of the model is missing from the set.
        """
        missing = self._load(_read(update_info.path) if update_info.path else self._received(update_info))
        if missing:
            source = update_info.path or "what was sent"
            raise ValueError(f"{', '.join(sorted(missing))} missing from {source}")

    def shutdown(self) -> None:
        """Leave the group."""
        if self._group is not None:
            self._group.close()
            self._group = None

    def _keep(self, what: str, error: Exception) -> None:
        place = traceback.extract_tb(error.__traceback__)[-1]
        text = str(error) or f"in {place.name}, {place.filename}:{place.lineno}"  # vLLM's loaders assert without a word
        self.problem, self.lost = f"{what}: {type(error).__name__}: {text}", isinstance(error, TransferLost)

    def _received(self, info: PushInfo) -> Iterator[tuple[str, Tensor]]:
        if self._group is None:
            raise TransferLost("the worker is in no group with a trainer")
        for bucket in info.buckets:
            sizes = [math.prod(shape) * getattr(torch, dtype).itemsize for _, dtype, shape in bucket]
            data = torch.empty(sum(sizes), dtype=torch.uint8, device=self._group.device)
            self._group.broadcast(data)
            for (name, dtype, shape), part in zip(bucket, data.split(sizes), strict=True):
                yield name, part.view(getattr(torch, dtype)).view(shape)

    @torch.inference_mode()
    def _load(self, source: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load all tensors; the model's parameters that got none."""
        expected = {name for name, _ in self.model.named_parameters()}
        with set_current_vllm_config(self.vllm_config):
            initialize_layerwise_reload(self.model)
            try:
                loaded = self.model.load_weights(source)
            finally:  # after an error too: it puts the tensors back that the kernels use
                finalize_layerwise_reload(self.model, self.model_config)
        renew_packed(self.model)
        missing: set[str] = expected - loaded
        return missing


class ServerWorker:
    """Methods for vLLM's worker; the attributes are the worker's own."""

    vllm_config: Any
    weight_transfer_engine: Any
    finish_weight_update: Callable[[], None]
    get_model: Callable[[], nn.Module]
    spo_hiding: RemovableHandle | None = None

    def spo_describe(self) -> dict[str, Any]:
        """What a trainer must know about the server before it sends a request."""
        config, transfer = self.vllm_config.model_config, self.vllm_config.weight_transfer_config
        encoders = config.multimodal_config
        return {
            "model": config.model,
            "sizes": {name: getattr(config.hf_text_config, name, None) for name in MODEL_SIZES},
            "multimodal": encoders is not None and not encoders.language_model_only,
            "dtype": str(config.dtype).removeprefix("torch."),
            "max_model_len": config.max_model_len,
            "vocab_size": config.get_vocab_size(),
            "logprobs_mode": config.logprobs_mode,
            "max_logprobs": config.max_logprobs,
            "weight_transfer": transfer and transfer.backend,
            "device": self.vllm_config.device_config.device_type,
        }

    def spo_hide_tokens(self, first: int) -> None:
        """Sample no token from ``first`` on, until told anew: the run's tokenizer does not know them.

        A logit bias would do, but on GPUs vLLM ends its engine over one of more than 1,024 tokens.
        """
        if self.spo_hiding is not None:
            self.spo_hiding.remove()
        self.spo_hiding = hide_tokens(self.get_model(), first)

    def spo_end_update(self) -> None:
        """End the update that a trainer has left open which died in the middle of it; vLLM would refuse another."""
        if self.weight_transfer_engine.updating:
            self.finish_weight_update()

    def spo_weight_problem(self) -> dict[str, Any]:
        """What was wrong with the last group or the last weights, ``problem``, and whether another try may do."""
        return {"problem": self.weight_transfer_engine.problem, "lost": self.weight_transfer_engine.lost}


def _read(path: str) -> Iterator[tuple[str, Tensor]]:
    with safe_open(path, framework="pt") as weights:
        for name in weights.keys():  # noqa: SIM118  (a safetensors file is no mapping)
            yield name, weights.get_tensor(name)


WeightTransferEngineFactory.register_engine(TRANSFER_BACKEND, WeightReceiver)
