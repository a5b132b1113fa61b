"""Peak memory and time of the policy's head, and speed of a whole update, with and without each option.

``python scripts/bench_learner.py`` compares the head of this project with the plain one: all logits at once, divided by
the temperature, log-probabilities by gathering and log-sum-exp, entropies without gradient, and autograd's backward
pass; what TRL does without fused kernels. Forward and backward pass, values and gradients of both included.

``python scripts/bench_learner.py --device cuda --update`` measures an update of a policy with random weights: score,
forward and backward pass over the micro-batches, and a step of AdamW, through the project's own learner. Each row of a
shape changes one thing about its first row. Model FLOPs count each product of the model once a pass (one pass to score,
three to learn, two with LoRA where the product is with a weight, whose gradient it does not need), causal attention by
half, and nothing that is computed again.

Every measurement is a process of its own, those of two methods in turn. Memory is what the peak adds to what was there
before the call: on CUDA by the allocator, on Linux by the kernel's peak of resident memory, which is reset before.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import Qwen3Config, Qwen3ForCausalLM

import spo_lightning.policy
from spo_lightning.algorithms import PPOClipLoss, linear_logprobs, selected_logprobs
from spo_lightning.distributed import Ranks
from spo_lightning.experience import Experience, TokenSequence
from spo_lightning.lora import LoraSettings, add_adapters
from spo_lightning.micro_batches import MicroBatching
from spo_lightning.packing import has_packing_kernels
from spo_lightning.passes import accumulate_gradient, score
from spo_lightning.policy import Policy, checkpoint_activations, compile_layers, decoder_layers
from spo_lightning.unpadded import UNPADDED

BAR_SIZE, MEMORY_BAR, TIME_BAR = (4096, 151_936), 1 / 8, 1.15
SEQUENCE_LENGTH = 512
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 128,
        "vocab_size": 4096,
    },
    "0.6B": {"hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "intermediate_size": 3072},
    "1.7B": {"hidden_size": 2048, "num_hidden_layers": 28, "num_attention_heads": 16, "intermediate_size": 6144},
    "4B": {"hidden_size": 2560, "num_hidden_layers": 36, "num_attention_heads": 32, "intermediate_size": 9728},
    "8B": {
        "hidden_size": 4096,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "intermediate_size": 12288,
        "tie_word_embeddings": False,
    },
}
COMMON_SHAPE = {"vocab_size": 151_936, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True}
FIRST_ROW = {
    "head": "torch",
    "attention": UNPADDED,
    "checkpointing": True,
    "precision": "bf16-true",
    "compile": False,
    "lora": False,
    "optimizer": "torch.optim:AdamW",
}
CHANGES: dict[str, dict[str, Any]] = {
    "bf16-true, checkpointing": {},
    "plain head": {"head": "plain"},
    "Liger's head": {"head": "liger"},
    "padding computed": {"attention": "sdpa"},
    "flash attention": {"attention": "flash_attention_2"},
    "no checkpointing": {"checkpointing": False},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "float32": {"precision": "32-true"},
    "torch.compile": {"compile": True},
    "LoRA, rank 16": {"lora": True},
    "8-bit AdamW": {"optimizer": "bitsandbytes.optim:AdamW8bit"},
}
PACKAGES = {
    "Liger's head": "liger_kernel",
    "flash attention": "flash_attn",
    "LoRA, rank 16": "peft",
    "8-bit AdamW": "bitsandbytes",
}
NEEDS_CUDA = {"Liger's head", "flash attention"}
PEAK_BF16_TFLOPS = {"H100 PCIe": 756.0, "H100 NVL": 835.0, "H100": 989.0, "H200": 989.0, "A100": 312.0}  # first match
UPDATE_SIZES = ("sequences", "length", "micro_batch_tokens", "repeats")
Measurement = dict[str, float]


class PeakMemory:
    """Peak of the memory in use since this was built, beyond what was in use then."""

    def __init__(self, device: str) -> None:
        self.device = device
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")
            self.before = self._resident("VmRSS")

    def gib(self) -> float:
        """GiB so far."""
        peak = torch.cuda.max_memory_allocated() if self.device == "cuda" else self._resident("VmHWM")
        return (peak - self.before) / 2**30

    @staticmethod
    def _resident(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def seconds_of(action: Callable[[], object], device: str) -> tuple[float, float]:
    """Seconds of one call: by the clock, and of processor time, which other programs on the machine disturb less."""
    finish = torch.cuda.synchronize if device == "cuda" else lambda: None
    finish()
    start, processor_start = time.perf_counter(), time.process_time()
    action()
    finish()
    return time.perf_counter() - start, time.process_time() - processor_start


def plain_head(hidden: Tensor, weight: Tensor, token_ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies from the logits of all tokens, a sequence of ``SEQUENCE_LENGTH`` at a time."""
    logits = (hidden @ weight.T).float()
    logits = logits / temperature
    chosen = logits.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
    logsumexp = torch.cat([sequence.logsumexp(-1) for sequence in logits.split(SEQUENCE_LENGTH)])
    with torch.no_grad():
        entropies = []
        for rows in logits.split(128):
            logprobs = rows.log_softmax(-1)
            entropies.append(-(logprobs.exp() * logprobs).sum(-1))
    return chosen - logsumexp, torch.cat(entropies)


def measure_head(task: Mapping[str, Any], device: str) -> Measurement:
    """GiB and seconds of one forward and backward pass of the head."""
    dtype = getattr(torch, task["dtype"])

    def run(tokens: int, vocab_size: int, hidden_size: int) -> Measurement:
        generator = torch.Generator(device).manual_seed(0)
        made = {"generator": generator, "device": device}
        hidden = torch.randn(tokens, hidden_size, **made).to(dtype).requires_grad_()
        weight = torch.randn(vocab_size, hidden_size, **made).mul_(0.03).to(dtype).requires_grad_()
        token_ids = torch.randint(vocab_size, (tokens,), **made)
        upstream = torch.randn(tokens, **made)
        head = plain_head if task["method"] == "plain" else linear_logprobs
        memory = PeakMemory(device)
        seconds, processor = seconds_of(lambda: head(hidden, weight, token_ids, 1.0)[0].backward(upstream), device)
        return {"GiB": memory.gib(), "seconds": seconds, "processor": processor}

    size = task["tokens"], task["vocab"], task["hidden"]
    run(*(size if device == "cuda" else (SEQUENCE_LENGTH, 1000, 64)))  # a GPU loads its kernels at the first call
    return run(*size)


def plain_policy_head(
    hidden: Tensor, weight: Tensor, token_ids: Tensor, temperature: float, bias: Tensor | None, **_: Any
) -> tuple[Tensor, Tensor]:
    """``linear_logprobs`` by a head that holds the logits of all its tokens."""
    return selected_logprobs(functional.linear(hidden, weight, bias), token_ids, temperature)


def build_policy(task: Mapping[str, Any], device: str) -> Policy:
    """A policy with random weights and the options of ``task``."""
    config = Qwen3Config(**{**COMMON_SHAPE, **SHAPES[task["shape"]]})
    dtype = torch.bfloat16 if task["precision"] == "bf16-true" else torch.float32
    with torch.device(device):
        model = Qwen3ForCausalLM._from_config(config, dtype=dtype)
    lora = LoraSettings(rank=16) if task["lora"] else None
    if lora is not None:
        add_adapters(model, lora)
    if task["checkpointing"]:
        checkpoint_activations(model)
    if task["compile"]:
        compile_layers(model, sharded=False)
    policy = Policy(model.train(), lora, "liger" if task["head"] == "liger" else "torch")
    model.set_attn_implementation(task["attention"])
    return policy


def make_experience(vocab_size: int, count: int, length: int) -> Experience:
    """``count`` sequences of half to all of ``length`` tokens; the first eighth of each is the prompt."""
    generator = torch.Generator().manual_seed(0)
    sequences = []
    for total in torch.linspace(length / 2, length, count).long().tolist():
        token_ids = torch.randint(vocab_size, (total,), generator=generator)
        sequences.append(TokenSequence(token_ids, torch.arange(total) >= total // 8))
    advantages = torch.randn(count, generator=generator, dtype=torch.float64)
    sampling_logprobs = tuple(torch.zeros(int(sequence.completion_mask.sum())) for sequence in sequences)
    return Experience(tuple(sequences), None, sampling_logprobs, advantages)


def update_flops(model: Any, experience: Experience, lora: bool) -> float:
    """Model FLOPs of scoring and learning from all sequences, with the head on the sampled tokens."""
    config = model.config
    parameters = sum(p.numel() for layer in decoder_layers(model) for p in layer.parameters() if p.ndim == 2)
    lengths = [len(sequence) for sequence in experience.sequences]
    attention = 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    weighted = 2 * parameters * sum(lengths) + 2 * config.hidden_size * config.vocab_size * experience.num_tokens
    return (3 if lora else 4) * weighted + 4 * attention * sum(length**2 for length in lengths)


def measure_update(task: Mapping[str, Any], device: str) -> Measurement:
    """GiB in all, tokens and model FLOPs a second of an update; the first one, which also allocates, is not timed."""
    torch.manual_seed(0)
    torch.backends.cuda.enable_cudnn_sdp(False)  # as a run does
    memory = PeakMemory(device)
    policy = build_policy(task, device)
    if task["head"] == "plain":
        spo_lightning.policy.linear_logprobs = plain_policy_head
    experience = make_experience(policy.model.config.vocab_size, task["sequences"], task["length"])
    optimizer = resolve_name(task["optimizer"])([p for p in policy.parameters() if p.requires_grad], lr=1e-6)
    packed = has_packing_kernels(task["attention"])
    micro = MicroBatching(task["micro_batch_tokens"], 0, 1.0, packed, torch.device(device))
    ranks, loss = Ranks(), PPOClipLoss()
    mixed = task["precision"] == "bf16-mixed"
    autocast = torch.autocast(device, torch.bfloat16, enabled=mixed, cache_enabled=False)  # as Lightning's

    def update() -> None:
        with autocast:
            old_logprobs = tuple(score(policy, experience.sequences, micro, ranks))
            batch = replace(experience, old_logprobs=old_logprobs)
            accumulate_gradient(policy, loss, batch, micro, ranks, lambda value, last: value.backward())
        optimizer.step()
        optimizer.zero_grad()

    update()
    seconds = min(seconds_of(update, device)[0] for _ in range(task["repeats"]))
    return {
        "GiB": memory.gib(),
        "tokens/s": sum(map(len, experience.sequences)) / seconds,
        "TFLOP/s": update_flops(policy.model, experience, task["lora"]) / seconds / 1e12,
    }


def run_task(measure: str, task: Mapping[str, Any], arguments: argparse.Namespace) -> Measurement | None:
    """Measure in a process of its own; None when the device's memory does not suffice."""
    command = [sys.executable, __file__, "--device", arguments.device, "--task", json.dumps([measure, task])]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def work(task: str, device: str) -> None:
    """Carry out one measurement and print it."""
    measure, options = json.loads(task)
    try:
        print(json.dumps((measure_update if measure == "update" else measure_head)(options, device)))
    except torch.OutOfMemoryError:
        print("null")


def print_heads(arguments: argparse.Namespace) -> None:
    """The table of the head."""
    print(f"{'':>27}{'peak':>7}{'seconds':>9}{'':>9}{'cpu s':>9}{'':>3}chunked / plain")
    headings = "".join(f"{name:>9}" for name in ("min", "median", "min", "memory", "time", "cpu"))
    print(f"{'T':>7}{'V':>9}  {'head':<9}{'GiB':>7}{headings}")
    for vocab in arguments.vocab:
        for tokens in arguments.tokens:
            sizes = {"tokens": tokens, "vocab": vocab, "hidden": arguments.hidden, "dtype": arguments.dtype}
            found: dict[str, list[Measurement]] = {"plain": [], "chunked": []}
            for _ in range(arguments.repeats):
                for method, results in found.items():
                    result = run_task("head", {**sizes, "method": method}, arguments)
                    results += [] if result is None else [result]
            print_head_rows(tokens, vocab, found)


def print_head_rows(tokens: int, vocab: int, found: Mapping[str, list[Measurement]]) -> None:
    """The lines of one size: each head, and the chunked one's share of the plain one's memory and time."""
    best: dict[str, tuple[float, float, float]] = {}
    for method, results in found.items():
        label = f"{tokens:>7,}{vocab:>9,}  {method:<9}"
        if not results:
            print(f"{label}out of memory", flush=True)
            continue
        memory = max(result["GiB"] for result in results)
        seconds = [result["seconds"] for result in results]
        best[method] = memory, min(seconds), min(result["processor"] for result in results)
        line = f"{label}{memory:>7.2f}{min(seconds):>9.3f}{statistics.median(seconds):>9.3f}{best[method][2]:>9.3f}"
        if method == "chunked" and "plain" in best:
            shares = [mine / plain for mine, plain in zip(best["chunked"], best["plain"], strict=True)]
            line += "".join(f"{share:>9.3f}" for share in shares)
            if (tokens, vocab) == BAR_SIZE:
                line += "  holds" if shares[0] <= MEMORY_BAR and shares[1] <= TIME_BAR else "  MISSED"
        print(line, flush=True)


def why_not(label: str, device: str) -> str | None:
    """What an option of the table lacks here."""
    if label in NEEDS_CUDA and device != "cuda":
        return "needs CUDA"
    package = PACKAGES.get(label)
    return None if package is None or find_spec(package) else f"needs {package}"


def print_updates(arguments: argparse.Namespace) -> None:
    """The table of whole updates."""
    print(f"{'shape':<7}{'':<26}{'tokens/s':>10}{'TFLOP/s':>9}{'MFU':>7}{'GiB':>8}")
    for shape in arguments.shape or (["0.6B", "1.7B", "4B", "8B"] if arguments.device == "cuda" else ["tiny"]):
        for label, change in CHANGES.items():
            if reason := why_not(label, arguments.device):
                print(f"{shape:<7}{label:<26}{reason}", flush=True)
                continue
            sizes = {
                name: getattr(arguments, name) for name in ("sequences", "length", "micro_batch_tokens", "repeats")
            }
            task = {**FIRST_ROW, **change, **sizes, "shape": shape}
            result = run_task("update", task, arguments)
            if result is None:
                print(f"{shape:<7}{label:<26}out of memory", flush=True)
                continue
            peak = None if task["precision"] == "32-true" else arguments.peak_tflops
            mfu = "" if peak is None else f"{result['TFLOP/s'] / peak:.1%}"
            speeds = f"{result['tokens/s']:>10,.0f}{result['TFLOP/s']:>9.4g}{mfu:>7}"
            print(f"{shape:<7}{label:<26}{speeds}{result['GiB']:>8.2f}", flush=True)


def describe_device(device: str) -> str:
    """Name of the processor that computes."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    model = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    return f"{model.split(':')[1].strip()}, {torch.get_num_threads()} threads"


def main() -> None:
    """Print a table, or carry out one measurement of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096], help="head: numbers of tokens")
    parser.add_argument("--vocab", type=int, nargs="+", default=[32_000, 151_936], help="head: vocabulary sizes")
    parser.add_argument("--hidden", type=int, default=1024, help="head: width of the hidden states")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="head: of its inputs")
    parser.add_argument("--update", action="store_true", help="measure whole updates instead")
    parser.add_argument("--shape", choices=list(SHAPES), nargs="+", help="update: all but tiny; on the CPU tiny alone")
    parser.add_argument("--sequences", type=int, default=16, help="update: in the mini-batch")
    parser.add_argument("--length", type=int, default=2048, help="update: tokens of the longest sequence")
    parser.add_argument("--micro-batch-tokens", type=int, default=16_384, help="update: bound on a micro-batch")
    parser.add_argument(
        "--peak_tflops", "--peak-tflops", type=float, help="update: bfloat16 peak of the device; known for some GPUs"
    )
    parser.add_argument("--task", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task is not None:
        return work(arguments.task, arguments.device)
    name = describe_device(arguments.device)
    if arguments.peak_tflops is None:
        known = (peak for card, peak in PEAK_BF16_TFLOPS.items() if card in name and arguments.device == "cuda")
        arguments.peak_tflops = next(known, None)
    print(f"{name}; torch {torch.__version__}")
    return print_updates(arguments) if arguments.update else print_heads(arguments)


if __name__ == "__main__":
    main()
