"""Log-probabilities and the preference losses on them: arrays and floats only."""
