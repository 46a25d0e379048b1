"""Our own engine as a provider: the only package outside of engine/ that imports it."""

from autobot_llm.providers.native.provider import NativeProvider

__all__ = ["NativeProvider"]
