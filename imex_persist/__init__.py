"""imex_persist: tensor-parallel LLM decoding in one persistent CUDA kernel per GPU. Nothing heavy is imported until it is used."""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "DeviceError",
    "FaultError",
    "ImexError",
    "Logprob",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "__version__",
]

_HOME = {
    "LLM": "imex_persist.llm",
    "AsyncLLM": "imex_persist.async_llm",
    "RequestOutputKind": "imex_persist.sampling_params",
    "SamplingParams": "imex_persist.sampling_params",
    "CompletionOutput": "imex_persist.outputs",
    "Logprob": "imex_persist.outputs",
    "RequestOutput": "imex_persist.outputs",
    "DeviceError": "imex_persist.errors",
    "FaultError": "imex_persist.errors",
    "ImexError": "imex_persist.errors",
}

if TYPE_CHECKING:
    from imex_persist.async_llm import AsyncLLM
    from imex_persist.errors import DeviceError, FaultError, ImexError
    from imex_persist.llm import LLM
    from imex_persist.outputs import CompletionOutput, Logprob, RequestOutput
    from imex_persist.sampling_params import RequestOutputKind, SamplingParams


def __getattr__(name: str):
    if name in _HOME:
        import importlib

        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'imex_persist' has no attribute {name!r}")
