"""vLLM servers as a provider: over HTTP to running ones, and starting one. Knows vLLM's ways; loads nothing of vLLM."""

from autobot_llm.providers.vllm.provider import VllmProvider, vllm_provider

__all__ = ["VllmProvider", "vllm_provider"]
