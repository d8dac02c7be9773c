"""
Drive a queue and its twin through random steps.

``PERSIPUBSUB_EXAMPLES`` is the number of runs; ``PERSIPUBSUB_SEED`` repeats those of an earlier
test, which printed it.
"""

import os
import random

import hypothesis
import hypothesis.stateful
import pytest

from tests.queue_machine import QueueMachine

EXAMPLES = int(os.environ.get("PERSIPUBSUB_EXAMPLES", "60"))
STEPS = 40


# Hypothesis takes up to 300 s to shrink what failed, and shows the example only behind that.
@pytest.mark.timeout(600)
def test_queue_is_like_its_twin() -> None:
    seed = int(os.environ.get("PERSIPUBSUB_SEED") or random.randrange(1 << 32))
    print(f"PERSIPUBSUB_SEED={seed} PERSIPUBSUB_EXAMPLES={EXAMPLES}")
    hypothesis.seed(seed)(QueueMachine)
    hypothesis.stateful.run_state_machine_as_test(
        QueueMachine,
        settings=hypothesis.settings(max_examples=EXAMPLES,
                                     stateful_step_count=STEPS,
                                     deadline=None,
                                     database=None,
                                     print_blob=True,
                                     suppress_health_check=list(hypothesis.HealthCheck)))
