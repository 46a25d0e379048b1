"""OpenAI's wire format: request bodies in, reply bodies and server-sent events out.

Format: https://platform.openai.com/docs/api-reference (chat, completions, models, errors).
"""
