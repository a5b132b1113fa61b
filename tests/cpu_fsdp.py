"""Lightning's FSDPStrategy where there is no GPU."""

from lightning.pytorch.strategies import FSDPStrategy


class CPUFSDPStrategy(FSDPStrategy):
    """The same class under another name: the trainer refuses ``FSDPStrategy`` itself, by name, without GPUs."""
