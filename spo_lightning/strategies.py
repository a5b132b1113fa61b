"""FSDP2 as a Lightning strategy."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.optim import Optimizer

from spo_lightning.errors import ConfigError


class FSDP2Strategy(ModelParallelStrategy):
    """Shards parameters, gradients and optimizer state as DTensors (``torch.distributed.fsdp.fully_shard``).

    ``ModelParallelStrategy`` with all devices as data-parallel ones, and the options that its users expect of FSDP.

    Args:
        cpu_offload: keep parameters, gradients and optimizer state in host memory, and step the optimizer there.
        replicas: hybrid sharding: so many groups of ranks hold the whole model each, sharded within the group. Usually
            the number of nodes; 1 shards over all ranks.
        save_distributed_checkpoint: each rank writes its shard; otherwise rank 0 writes one file of the whole.
        timeout_minutes: longest wait in a collective, after which a rank gives up.

    Attributes:
        shard_mesh: what parameters are sharded over, of one dimension or (replica, shard); set once the processes have
            met.
    """

    shard_mesh: DeviceMesh

    def __init__(
        self,
        cpu_offload: bool = False,
        replicas: int = 1,
        save_distributed_checkpoint: bool = True,
        timeout_minutes: float = 30,
    ) -> None:
        super().__init__(
            data_parallel_size=1,
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            timeout=timedelta(minutes=timeout_minutes),
        )
        self.cpu_offload = cpu_offload
        self.replicas = replicas

    def setup_environment(self) -> None:
        """Let the processes meet, and lay the mesh.

        Raises:
            ConfigError: ``replicas`` does not divide the number of ranks.
        """
        ranks = self.num_nodes * self.num_processes
        if self.replicas < 1 or ranks % self.replicas:
            raise ConfigError(f"strategy.replicas is {self.replicas}; it must divide the number of ranks, {ranks}")
        self._data_parallel_size = ranks
        super().setup_environment()
        shape: tuple[int, ...] = (ranks,) if self.replicas == 1 else (self.replicas, ranks // self.replicas)
        names = ("replicate", "shard")[-len(shape) :]
        self.shard_mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=names)

    def model_to_device(self) -> None:
        """Leave offloaded parameters in host memory."""
        if not self.cpu_offload:
            super().model_to_device()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """State of an optimizer, for a checkpoint.

        Of an optimizer that has taken no step, torch makes one up by a step with learning rate 0. That step would count
        in AdamW's bias correction, so it is undone, here and in the checkpoint.
        """
        unused = not optimizer.state
        state = super().optimizer_state(optimizer)
        if unused:
            for values in state.get("state", {}).values():  # ranks that do not write one file get nothing
                values.get("step", torch.empty(0)).zero_()
            optimizer.state.clear()
        return state
