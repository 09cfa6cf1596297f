"""Qwen2.5 as pure functions over plain nested dicts of arrays."""
