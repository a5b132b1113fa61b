"""What a run needs of each device's memory: arithmetic on sizes that were counted or traced elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, fields

GIB = 2**30
ALLOWANCE = 2 * GIB  # CUDA context, NCCL buffers and kernels' workspaces; not computed
COMFORT = 0.9  # share of a device that a plan may fill: the allocator's fragmentation is not computed
REDUCE_BYTES = 4  # gradients are reduced between devices in float32
UNITS_IN_FLIGHT = 2  # decoder layers that FSDP holds whole: one computes while the next is gathered


@dataclass(frozen=True)
class ModelSize:
    """Numbers of parameters.

    Attributes:
        total: all, tied ones once.
        trained: those that have a gradient.
        unit: of the largest decoder layer, what FSDP gathers at a time.
        root: outside of the decoder layers: embedding, head and last norm.
        num_units: decoder layers.
        largest: of the largest parameter.
    """

    total: int
    trained: int
    unit: int
    root: int
    num_units: int
    largest: int


@dataclass(frozen=True)
class Layout:
    """How a strategy lays a policy out over devices.

    Attributes:
        name: of the strategy, to be printed.
        devices: all devices of the run.
        sharded: whether parameters are sharded at all, and gathered a unit at a time.
        shards: devices that hold one copy of the parameters between them.
        keeps_gathered: parameters stay whole from the forward to the backward pass (SHARD_GRAD_OP).
        offloaded: parameters, gradients and optimizer state live in host memory.
        gradient_buckets: DDP reduces a copy of the gradients.
    """

    name: str
    devices: int = 1
    sharded: bool = False
    shards: int = 1
    keeps_gathered: bool = False
    offloaded: bool = False
    gradient_buckets: bool = False


@dataclass(frozen=True)
class OptimizerMemory:
    """Bytes of an optimizer for each element that it trains.

    Attributes:
        state: kept between steps.
        step: on top of it during a step.
    """

    state: float
    step: float


@dataclass(frozen=True)
class MicroBatchMemory:
    """Bytes of one micro-batch beside parameters and their accumulated gradients.

    Attributes:
        activations: kept from the forward pass of the decoder for its backward pass.
        head: on top of them, while log-probabilities and their gradient are computed.
        backward: on top of them, at most, in the backward pass of the decoder.
    """

    activations: int
    head: int
    backward: int

    @property
    def peak(self) -> int:
        """Most bytes at once."""
        return self.activations + max(self.head, self.backward)


@dataclass(frozen=True)
class EngineMemory:
    """Bytes of an engine on one device while it is awake; it has none there while it sleeps.

    Attributes:
        weights: its copy of the policy.
        cache: keys and values of the running requests.
        work: on top of both, at most, in a prefill or a decoding step.
        host: its weights in the host's memory while it sleeps.
        ready_at_push: its cache is there already while new weights come in.
        problem: why it cannot work with that.
    """

    weights: float
    cache: float
    work: float
    host: float = 0
    ready_at_push: bool = False
    problem: str | None = None


@dataclass(frozen=True)
class Row:
    """One line of a plan: bytes on a device while completions are generated, gradients computed, and a step taken."""

    name: str
    rollout: float
    update: float
    step: float


PHASES = tuple(field.name for field in fields(Row))[1:]


@dataclass(frozen=True)
class Plan:
    """What each device needs, by use and phase.

    Attributes:
        rows: the uses.
        problem: why it would not work, whatever the total.
    """

    rows: tuple[Row, ...]
    problem: str | None = None

    def total(self, phase: str) -> float:
        """Bytes of a phase, one of ``PHASES``."""
        return sum(getattr(row, phase) for row in self.rows)

    @property
    def peak(self) -> float:
        """Bytes of the phase that needs most."""
        return max(self.total(phase) for phase in PHASES)

    def __getitem__(self, name: str) -> Row:
        """The row of that name."""
        return next(row for row in self.rows if row.name == name)


def make_plan(
    model: ModelSize,
    layout: Layout,
    master_bytes: int,
    trained_bytes: int,
    compute_bytes: int,
    optimizer: OptimizerMemory,
    micro_batch: MicroBatchMemory,
    engine: EngineMemory,
) -> Plan:
    """Add up what a device holds.

    Args:
        model: numbers of parameters.
        layout: of the strategy.
        master_bytes: of a parameter as it is held.
        trained_bytes: of one that the optimizer trains, and of its gradient.
        compute_bytes: of a parameter that FSDP has gathered.
        optimizer: bytes for each trained parameter.
        micro_batch: the largest one.
        engine: of the rollouts.
    """
    here = 0 if layout.offloaded else 1 / layout.shards
    trained = model.trained * here
    gradients = trained_bytes * trained
    parameters = master_bytes * (model.total - model.trained) * here + gradients
    rows = [
        Row("parameters", parameters, parameters, parameters),
        Row("gradients", 0, gradients, gradients),
        Row("optimizer state", *[optimizer.state * trained] * 3),
        Row("optimizer step", 0, 0, optimizer.step * trained),
    ]
    if layout.gradient_buckets:
        rows.append(Row("gradient buckets", *[gradients] * 3))
    if layout.sharded:
        rows += _gathered(model, layout, compute_bytes, micro_batch)
    rows += [
        Row("activations", 0, micro_batch.activations, 0),
        Row("head or backward", 0, max(micro_batch.head, micro_batch.backward), 0),
        *_engine_rows(model, layout, master_bytes, engine),
        Row("CUDA, NCCL (allowance)", *[ALLOWANCE] * 3),
    ]
    return Plan(tuple(rows), engine.problem)


def _engine_rows(model: ModelSize, layout: Layout, master_bytes: int, engine: EngineMemory) -> list[Row]:
    """What there is of an engine, in the phase in which it is awake.

    For a push FSDP gathers a unit, as it is held, and copies a parameter of it.
    """
    pushed = master_bytes * (max(model.root, model.unit) + model.largest)
    uses = {
        "engine weights": engine.weights,
        "engine cache": engine.cache,
        "engine work": engine.work,
        "weights on their way": pushed if layout.sharded and engine.ready_at_push else 0,
    }
    return [Row(name, size, 0, 0) for name, size in uses.items() if size]


def _gathered(model: ModelSize, layout: Layout, compute_bytes: int, micro_batch: MicroBatchMemory) -> list[Row]:
    """Whole units, and their gradients until they are reduced.

    The gradient of the root, which holds the head, waits for the embedding's. It is reduced at the very end, when the
    activations are gone.
    """
    units = UNITS_IN_FLIGHT * model.unit
    parameters = compute_bytes * (model.total if layout.keeps_gathered else min(model.total, model.root + units))
    in_flight = (compute_bytes + REDUCE_BYTES) * units
    at_the_end = REDUCE_BYTES * model.root - micro_batch.peak
    share = model.trained / model.total
    gradients = share * (compute_bytes * model.root + max(in_flight, at_the_end))
    return [Row("gathered units", 0, parameters, 0), Row("their gradients", 0, gradients, 0)]


def render(plan: Plan, gpu_bytes: float) -> str:
    """The plan as a table in GiB, with totals and the share of a device."""
    lines = [f"{'GiB on each device':<26}" + "".join(f"{phase:>10}" for phase in PHASES)]
    for row in plan.rows:
        cells = (getattr(row, phase) for phase in PHASES)
        lines.append(f"{row.name:<26}" + "".join(f"{cell / GIB:>10.2f}" if cell else f"{'-':>10}" for cell in cells))
    totals = [plan.total(phase) for phase in PHASES]
    lines.append(f"{'total':<26}" + "".join(f"{total / GIB:>10.2f}" for total in totals))
    lines.append(f"{f'share of {gpu_bytes / GIB:g}':<26}" + "".join(f"{total / gpu_bytes:>10.0%}" for total in totals))
    return "\n".join(lines)


def verdict(plan: Plan, gpu_bytes: float) -> str:
    """Whether the plan fits a device."""
    if plan.problem is not None:
        return f"does not fit: {plan.problem}"
    peak = f"{plan.peak / GIB:.1f} of {gpu_bytes / GIB:g} GiB"
    if plan.peak > gpu_bytes:
        return f"does not fit: {peak}"
    if plan.peak > COMFORT * gpu_bytes:
        return f"tight: {peak}; fragmentation may use up the rest"
    return f"fits: {peak}"
