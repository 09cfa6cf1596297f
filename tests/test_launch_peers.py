"""The yaml files of `launch`, read by SkyPilot itself and held against Kubernetes' own schemas.

Both come in an environment of their own, `pip install skypilot kubernetes-validate pytest`: what
SkyPilot wants beside it is nothing that a run needs.
"""

from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).parents[1] / "launch"


def test_skypilot_reads_the_task():
    sky = pytest.importorskip("sky", reason="pip install skypilot")
    task = sky.Task.from_yaml(str(LAUNCH / "sky.yaml"))
    (resources,) = task.resources
    assert str(resources.cloud) == "GCP" and resources.use_spot
    assert resources.accelerators == {"tpu-v5p-128": 1}
    assert task.name == "rpo-72b" and "rpo_jax.train" in task.run


@pytest.mark.parametrize("kubernetes", ["1.31", "1.34"])
def test_the_jobs_of_the_jobset_are_jobs(kubernetes):
    """A JobSet is a resource of its own; the template of each of its jobs is a Job's."""
    reason = "pip install kubernetes-validate"
    schemas = pytest.importorskip("kubernetes_validate", reason=reason)
    jobset = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    for replicated in jobset["spec"]["replicatedJobs"]:
        job = {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": replicated["name"]},
            "spec": replicated["template"]["spec"],
        }
        assert schemas.validate(job, kubernetes, strict=True) == kubernetes
        job["spec"] = {**job["spec"], "paralellism": 16}
        with pytest.raises(schemas.ValidationError, match="paralellism"):
            schemas.validate(job, kubernetes, strict=True)
