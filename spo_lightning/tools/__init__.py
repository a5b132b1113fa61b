"""Tools that a policy may call while it answers.

Names load on first use, so that a sandbox's process imports no more than it needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from spo_lightning.lazy_names import lazy_names

if TYPE_CHECKING:
    from spo_lightning.tools.formats import ChatTemplateCalls as ChatTemplateCalls
    from spo_lightning.tools.formats import CodeTags as CodeTags
    from spo_lightning.tools.protocol import CodeRunner as CodeRunner
    from spo_lightning.tools.protocol import Tool as Tool
    from spo_lightning.tools.protocol import ToolFormat as ToolFormat
    from spo_lightning.tools.python_interpreter import PythonInterpreter as PythonInterpreter
    from spo_lightning.tools.sandbox import LocalSandbox as LocalSandbox
    from spo_lightning.tools.sandbox_fusion import SandboxFusion as SandboxFusion
    from spo_lightning.tools.settings import ToolUse as ToolUse

_MODULES = {
    "ChatTemplateCalls": "formats",
    "CodeRunner": "protocol",
    "CodeTags": "formats",
    "LocalSandbox": "sandbox",
    "PythonInterpreter": "python_interpreter",
    "SandboxFusion": "sandbox_fusion",
    "Tool": "protocol",
    "ToolFormat": "protocol",
    "ToolUse": "settings",
}

__all__ = [
    "ChatTemplateCalls",
    "CodeRunner",
    "CodeTags",
    "LocalSandbox",
    "PythonInterpreter",
    "SandboxFusion",
    "Tool",
    "ToolFormat",
    "ToolUse",
]


__getattr__ = lazy_names(__name__, _MODULES)
