"""A pytest plugin: vLLM's second model runner, GPUs' default, on a CPU, where its Triton kernels are interpreted.

    .venv-vllm/bin/python -m pip install --no-deps --target .venv-vllm/triton triton==3.7.0
    PYTHONPATH=.venv-vllm/triton:tests/vllm .venv-vllm/bin/python -m pytest -p model_runner_v2 -n 0 --no-cov \
        tests/vllm/test_vllm_engine.py -k "not stalled"

Ten minutes. Attention remains the CPU's; the kernel of top-k and top-p, which the interpreter cannot run, is vLLM's
other implementation. A step is too slow for the test of a stalled engine.
"""

import os
from types import SimpleNamespace

os.environ |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}

import triton.backends  # noqa: E402

# vLLM looks for a back end of this name, and for one that is active.
triton.backends.backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)

from vllm.v1.sample.ops import topk_topp_sampler as sampler  # noqa: E402

sampler.apply_top_k_top_p_triton = sampler.apply_top_k_top_p_pytorch
