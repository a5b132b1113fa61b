"""Checkpoints looked at before they are loaded, and sharded ones read as if one process had written them."""

from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.format_utils import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from spo_lightning.errors import ConfigError
from spo_lightning.policy import PolicyConfig, plain_name
from spo_lightning.policy_files import load_policy

METADATA = "meta.pt"
OPTIMIZER = "optimizer_0"  # Lightning's name of the only one


def require_checkpoint(path: Path) -> None:
    """Refuse what ``spo fit`` did not write, or what torch will not load; the tensors themselves are not read.

    Raises:
        ConfigError: the file cannot be read, is another program's, cut off, or holds objects beside tensors and plain
            values.
    """
    sharded = path.is_dir()
    file = path / METADATA if sharded else path
    found: Any = None
    detail = ""
    if not sharded or (is_sharded(path) and (path / ".metadata").is_file()):
        try:
            with file.open("rb") as opened:
                whole = zipfile.is_zipfile(opened)
            found = torch.load(file, map_location="cpu", mmap=True) if whole else None
        except OSError as error:
            raise ConfigError(f"the checkpoint {path} cannot be read: {error}") from error
        except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
            reason = error.__context__ or error  # torch's own lies below its advice to load without looking
            named = re.search(r"GLOBAL (\S+) was not an allowed", str(reason))
            if named:
                raise ConfigError(
                    f"the checkpoint {path} holds an object ({named[1]}), and to load one may run any code. Have the "
                    "callback that saved it keep tensors and plain values; if you trust the file, call "
                    "torch.serialization.add_safe_globals in a module that the configuration names"
                ) from error
            detail = f" ({type(reason).__name__}: {reason})"
    if not isinstance(found, dict) or "spo" not in found:
        raise ConfigError(f"{path} is no checkpoint that spo fit wrote, or is cut off{detail}; take another one")


def require_same_policy(path: Path, config: PolicyConfig) -> None:
    """Refuse a checkpoint of another policy than the configured one; tensors are not read.

    Args:
        path: file, or folder of a sharding strategy.
        config: of the configured policy, which is built without weights.

    Raises:
        ConfigError: a parameter is in one of the two only, or has another shape.
    """
    saved = {name: shape for name, shape in _weight_shapes(path).items() if name.startswith("policy.")}
    policy = load_policy(config, weights=False)
    wanted = {f"policy.{plain_name(name)}": tensor.shape for name, tensor in policy.state_dict().items()}
    wrong = sorted(name for name in saved.keys() | wanted.keys() if saved.get(name) != wanted.get(name))
    if wrong:
        there, here = ("none" if of is None else tuple(of) for of in (saved.get(wrong[0]), wanted.get(wrong[0])))
        raise ConfigError(
            f"the checkpoint {path} is of another policy than the configured one: {len(wrong)} parameters differ, the "
            f"first is {wrong[0].removeprefix('policy.model.')} with shape {there} in the checkpoint and {here} here; "
            "give the model.policy, lora included, that it was trained with"
        )


def read_state(path: Path) -> dict[str, Any]:
    """What a checkpoint holds, of a file with its tensors still on the disk, of a folder without the sharded ones."""
    file = path / METADATA if is_sharded(path) else path
    state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    return state


def _weight_shapes(path: Path) -> dict[str, torch.Size]:
    if not is_sharded(path):
        return {name: tensor.shape for name, tensor in read_state(path)["state_dict"].items()}
    entries = FileSystemReader(path).read_metadata().state_dict_metadata
    of_weights = {name: entry for name, entry in entries.items() if name.startswith(("model.", "state_dict."))}
    return {
        name.partition(".")[2]: entry.size
        for name, entry in of_weights.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def is_sharded(path: Path) -> bool:
    """Whether this is a checkpoint folder of a sharding strategy."""
    return (path / METADATA).is_file()


def written_by_fsdp2(path: Path) -> bool:
    """Whether a sharded checkpoint is one of FSDP2; otherwise it is of ``FSDPStrategy``, which uses other names."""
    return any(name.startswith("state_dict.") for name in FileSystemReader(path).read_metadata().state_dict_metadata)


def consolidate(path: Path, optimizers: bool = True) -> dict[str, Any]:
    """Assemble a sharded checkpoint of FSDP or FSDP2 in host memory, in the form of an unsharded one.

    Args:
        path: folder that a sharding strategy wrote, from any number of ranks.
        optimizers: False leaves the state of the optimizers, which is most of it, on the disk.

    Returns:
        A Lightning checkpoint with full tensors; optimizer state by the position of the parameter.
    """
    shards = _read(path, None if optimizers else {"model", "state_dict"})
    states = [shards[key] for key in sorted(shards) if key.startswith("optimizer_")]
    return {
        **torch.load(path / METADATA, map_location="cpu", weights_only=True),
        "state_dict": shards["model"] if "model" in shards else shards["state_dict"],
        "optimizer_states": [_by_position(state) for state in states],
    }


def groups_of_unused_optimizers(path: Path) -> list[list[dict[str, Any]]] | None:
    """The settings of a checkpoint's optimizers, by parameter group, if none has any state, as before the first step.

    Args:
        path: file, or folder of a sharding strategy.

    Returns:
        ``None`` if there is state.
    """
    if is_sharded(path):
        names = FileSystemReader(path).read_metadata().state_dict_metadata
        if any(name.startswith(f"{OPTIMIZER}.state.") for name in names):
            return None
        states = [_read(path, {OPTIMIZER})[OPTIMIZER]]
    else:
        states = read_state(path)["optimizer_states"]
        if any(state["state"] for state in states):
            return None
    return [
        [{key: value for key, value in group.items() if key != "params"} for group in state["param_groups"]]
        for state in states
    ]


def _read(path: Path, keys: set[str] | None) -> dict[str, Any]:
    """What lies under some keys of a sharded checkpoint, or under all; as torch's own dcp_to_torch_save reads it."""
    shards: dict[str, Any] = {}
    planner = _EmptyStateDictLoadPlanner(keys)
    _load_state_dict(shards, storage_reader=FileSystemReader(path), planner=planner, no_dist=True)
    return shards


def _by_position(optimizer: dict[str, Any]) -> dict[str, Any]:
    """Optimizer state by name, as sharding strategies keep it, to state by number, as torch optimizers do."""
    names = [name for group in optimizer["param_groups"] for name in group["params"]]
    number = {name: position for position, name in enumerate(names)}
    return {
        "state": {number[name]: values for name, values in optimizer.get("state", {}).items()},
        "param_groups": [
            {**group, "params": [number[name] for name in group["params"]]} for group in optimizer["param_groups"]
        ],
    }
