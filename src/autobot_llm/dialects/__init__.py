"""Wire formats, each written once and in both directions: what a client sends us, and what we send a provider.

Pure functions of bytes, requests and events; nothing here knows connections. The conversation inside of an
`LLMRequest` is OpenAI's, so every other dialect is a translation to and from that.
"""
