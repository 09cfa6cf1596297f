"""Text from a model: prompts in, completions out."""
