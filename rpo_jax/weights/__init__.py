"""Weights between Hugging Face safetensors and our checkpoints."""
