"""Continued pretraining and Reasoning Preference Optimization (arXiv:2504.18080) in JAX.

The commands are modules: `python -m rpo_jax.train --config configs/<name>.py`. Importing this
package does nothing: no device is queried and no setting is changed.
"""

__version__ = "0.1.0"
