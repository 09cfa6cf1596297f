"""From records to a trained state: steps, optimizer, reference, checkpoints, metrics."""
