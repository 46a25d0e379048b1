"""Anthropic's wire format in both directions: requests and answers, as a server and as a client.

Format: https://platform.claude.com/docs/en/api/messages (messages, count_tokens, models, errors), in its API versions
2023-06-01 and 2026-10-21.

Inbound (a client asks us): `bodies`, `conversation`, `replies`, `stream`. Outbound (we ask Anthropic): `requests`,
`turns`, `caching`, `answers`. What the conversation of an `LLMRequest` has no word for travels in it under Anthropic's
own name: content parts of type "thinking", "redacted_thinking", "document" and "search_result", and the keys
"cache_control" and "is_error" of a part, a tool or a tool call.
"""
