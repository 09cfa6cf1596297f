"""From text and preferences to batches: tokenizers, record sets, row layouts, the loader."""
