"""Checks shared by the algorithms."""

from __future__ import annotations

from torch import Tensor


def same_length_problems(**columns: Tensor) -> list[str]:
    """Say what is wrong with columns that must be one-dimensional and of one length.

    Args:
        **columns: tensors by the name the caller knows them under.

    Returns:
        At most one problem, naming all shapes.
    """
    shapes = {tuple(column.shape) for column in columns.values()}
    if len(shapes) == 1 and all(len(shape) == 1 for shape in shapes):
        return []
    found = ", ".join(f"{name} {tuple(column.shape)}" for name, column in columns.items())
    return [f"shapes are {found}; all must be one-dimensional and equally long"]
