"""Ollama's wire format: chat, generate and embed bodies, newline-delimited JSON answers, model listings.

Format: https://github.com/ollama/ollama/blob/main/docs/api.md and docs/openapi.yaml, as of Ollama 0.40.
"""
